"""The blocks of params.yaml, a class each: every setting with its type, range, default and one description.

Light to import: what the other party sends is checked by these classes too, and the command line describes its options
with them.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from scaleot_core.common.validation import Block

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Threads = Annotated[int, Field(ge=0, le=1024)]
"""OpenMP dies of a signal where it can't start as many as it is told to."""
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Rates = Annotated[
    list[Rate],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    Field(min_length=1),
]
Name = Annotated[str, Field(min_length=1)]
AdapterKind = Literal["layers", "lora"]
Quantization = Literal["int8", "int4"]


class Data(Block):
    """Stage prepare_data: what is read, and how much of it."""

    questions: Name = "embedded"
    """embedded, hub, or a folder of <task>/train.jsonl and validation.jsonl (or .json, .parquet, .csv)"""
    questions_revision: str = ""
    """commit, tag or branch of the tasks' data sets on the hub; empty for the newest"""
    corpus: Name = "embedded"
    """embedded, a file (.jsonl, .json, .parquet, .csv, .txt), a folder of such, or a data set on the hub"""
    corpus_revision: str = ""
    """commit, tag or branch of the corpus on the hub; empty for the newest"""
    block_size: Annotated[int, Field(ge=8)] = 256
    """tokens in a corpus block"""
    train_blocks: Positive = 512
    """blocks to train harmonizers and scores on"""
    heldout_blocks: Positive = 32
    """blocks for perplexity, from other passages"""
    train_questions: Positive = 600
    """most training questions of a task"""
    eval_questions: Positive = 400
    """most evaluated questions of a task"""


class HarmonizerForm(Block):
    """The harmonizer (method section 1)."""

    rank: Positive = 64
    """r, 64 up to about 2B parameters, 256 above"""


class LayerImportance(Block):
    """Stage layer_importance: local fits and prior scores (method section 2)."""

    estimator: Literal["sensitivity", "block_influence"] = "sensitivity"
    """what the prior scores are computed from"""
    calibration_blocks: Positive = 128
    """blocks whose hidden states are kept for the local fits"""
    steps: Count = 500
    """steps of local regression of each harmonizer; with 0 they stay identities"""
    lr: Rate = 0.01
    """AdamW's learning rate"""
    sensitivity_blocks: Positive = 8
    """blocks on which a layer's sensitivity is measured"""


class Dlr(Block):
    """Stage train_harmonizers: Dynamic LayerReplace (method section 2)."""

    init: Literal["prior", "zero"] = "prior"
    """where the scores start"""
    group_size: Annotated[int, Field(ge=2)] = 4
    """N_g, neighbouring layers in a group, half of which is replaced in a sample"""
    keep_threshold: Fraction = 0.9
    """layers with p_i above it are kept ahead of the others of their group; 1 for none, the paper's rule"""
    steps: Count = 60
    """harmonizer updates"""
    batch_blocks: Positive = 2
    """corpus blocks in a step"""
    lr: Rate = 0.0001
    """AdamW's learning rate"""
    score_blocks: Positive = 64
    """training blocks set aside to compare candidates on"""
    score_interval: Positive = 10
    """harmonizer updates between two score updates"""
    score_lr: Annotated[float, Field(gt=0)] = 10.0
    """η, step of the score update"""
    candidates: Annotated[int, Field(ge=2)] = 3
    """N_c, distinct networks compared in a score update"""


class RankCompression(Block):
    """Stage compress: Selective Rank Compression (method section 4)."""

    whiten: bool = True
    """truncate the projections' outputs on the corpus (SVD-LLM), or, false, the matrices, as the paper does"""
    calibration_blocks: Positive = 64
    """training blocks whose projection inputs are the covariance"""


class Channels(Block):
    """Stage compress: channel pruning, beyond the paper (method section 7): by method channels, or beside β."""

    ratio: Fraction = 0.0
    """share of the feed-forward channels that is cut; 0 as in the paper"""
    tilt: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """how much harder the bottom is cut: shares fall evenly from ratio · (1 + tilt) to ratio · (1 − tilt) at the top"""
    within: str = ""
    """private file or ledger of `scaleot pack`: channels are kept of those alone that have left by it; empty for all"""

    @field_validator("tilt")
    @classmethod
    def _no_layer_loses_more_than_all(cls, tilt: float, info: ValidationInfo) -> float:
        ratio = info.data.get("ratio", 0.0)
        if ratio * (1 + abs(tilt)) > 1:
            raise ValueError(
                f"with ratio {ratio} a layer would lose more channels than it has; at most {1 / ratio - 1:.3g}"
            )
        return tilt


class Distill(Block):
    """Stage compress, method distilled: offsite-tuning's distillation (method section 9)."""

    steps: Count = 300
    """updates of the layers that are kept"""
    batch_blocks: Positive = 4
    """corpus blocks in a step"""
    lr: Rate = 0.0001
    """AdamW's peak learning rate"""


class Tuning(Block):
    """Stage full_finetune, the ceiling (method section 5)."""

    epochs: Positive = 2
    """most passes over the training examples"""
    max_steps: Count = 0
    """stop after this many steps; 0 for no limit"""
    batch_size: Positive = 8
    """examples in a step"""
    lr: Rates = [0.00005]
    """AdamW's peak learning rate; of several the one with the lowest held-out loss is taken"""
    validation_fraction: Fraction = 0.1
    """share of the examples held out, where several rates or patience need it; with 0 patience does nothing"""
    patience: Count = 0
    """stop after this many epochs without a lower held-out loss; 0 for all epochs"""
    warmup_ratio: Fraction = 0.1
    """share of the steps until the peak rate; linear to zero after it"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """largest norm of the gradient"""

    @field_validator("validation_fraction")
    @classmethod
    def _some_to_compare_rates_on(cls, fraction: float, info: ValidationInfo) -> float:
        if not fraction and len(info.data.get("lr", [])) > 1:
            raise ValueError("several learning rates are compared on held-out examples; raise it, or give one rate")
        return fraction


class OffsiteTuning(Tuning):
    """Stage offsite_tune: how the data owner tunes (method section 5)."""

    lr: Rates = [0.0003]
    """AdamW's peak learning rate; of several the one with the lowest held-out loss is taken"""
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    """ε of differential privacy (DP-SGD) for each training example; 0 for none"""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    """δ of differential privacy: at most one over the number of examples"""

    @field_validator("epsilon")
    @classmethod
    def _nothing_chosen_outside_the_budget(cls, epsilon: float, info: ValidationInfo) -> float:
        if epsilon and (len(info.data.get("lr", [])) > 1 or info.data.get("patience")):
            raise ValueError("with it held-out examples can't choose; give one learning rate, and patience 0")
        return epsilon


class LoraForm(Block):
    """Where LoRA is put in an emulator, and how large it is (method section 8)."""

    rank: Positive = 16
    """rank of LoRA's matrices"""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's scale, over its rank"""
    layers: Literal["all", "adapter"] = "all"
    """every decoder layer that the emulator still has, or the adapter layers alone"""
    modules: Literal["all", "attention"] = "all"
    """what LoRA is put into: attention projections and feed-forward matrices, or the projections alone"""


class Lora(LoraForm):
    """Stage offsite_tune, adapters lora (method section 8)."""

    lr: Rates = [0.001]
    """AdamW's peak learning rate; of several the one with the lowest held-out loss is taken"""

    @property
    def form(self) -> LoraForm:
        """What an adapter's reader has to know of it."""
        return LoraForm(**self.model_dump(exclude={"lr"}))


class AdapterLimits(Block):
    """How far from what was shipped an adapter may be that is plugged in.

    Adapters that were tuned honestly keep all of these with room to spare (docs/security.md). A tensor of zeros has
    moved by 1, one that was turned round by 2.
    """

    max_change: Annotated[float, Field(ge=0)] = 0.5
    """largest relative change of a layer (see `scaleot check`)"""
    max_tensor_change: Annotated[float, Field(ge=0)] = 0.9
    """largest relative change of one of a layer's tensors"""
    max_outlier: Annotated[float, Field(ge=0)] = 40.0
    """largest outlier of a layer"""
    max_loss_increase: Annotated[float, Field(ge=0)] = 5.0
    """most nats that the plug-in's loss on public text may be above the real model's"""


class Machine(Block):
    """Where the command line computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    threads: Threads = 0
    """CPU threads; 0 for all that this process may use, and at most OMP_NUM_THREADS"""
    dtype: str = "float32"
    """what models compute in, which a package says"""
    quantize: Quantization | None = None
    """what the matrices of compressed layers and harmonizers are quantized to: int8, or int4 (NF4, by bitsandbytes)"""


class Attack(Block):
    """Stage attack, off the main path: `make attack`."""

    steps: Positive = 64
    """updates of what the attacker trains"""
    batch_blocks: Positive = 4
    """corpus blocks in a step"""
    lr: Rate = 0.0001
    """AdamW's peak learning rate"""
    eval_points: Positive = 4
    """measurements during the attack, beside that of the start"""
    attackers: list[Literal["cut_only", "queries"]] = ["cut_only", "queries"]
    """who attacks the package beside one who trains everything in it, each with the same budget"""
    beside: list[Name] = []
    """folders of other packages of the model: attacker `collusion` starts from all of them and the package together"""
    sibling: str = ""
    """folder of a public model of the same shapes: attacker `sibling` starts from it and the package; empty for none"""
    references: list[Literal["model", "widened", "without_weights", "uniform"]] = [
        "model",
        "widened",
        "without_weights",
        "uniform",
    ]
    """what else is attacked with the same budget"""
    eval_questions: Annotated[int, Field(ge=2)] = 100
    """most evaluated questions of a task that the model, the package and each attacked one are measured on"""
    membership_records: Annotated[int, Field(ge=2)] = 200
    """most private training questions, and held-out ones, in membership inference"""


class Evaluate(Block):
    """Stages evaluate, zero_shot and full_finetune: lm-eval (method section 6)."""

    batch_size: Positive = 32
    """requests in a forward pass"""
