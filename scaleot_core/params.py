"""params.yaml as checked values. Every key there is a field here, with its type, range and meaning."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator

from scaleot_core.common.errors import UserError
from scaleot_core.common.validation import Block, validate_block

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Data(Block):
    """What `prepare_data` reads and how much of it."""

    source: Name
    """The questions: `embedded`, `hub`, or a folder with `<task>/train.jsonl` and `validation.jsonl`."""
    corpus: Name
    """The public text: `embedded`, a .jsonl (field `text`) or .txt file, or a hub data set."""
    block_size: Annotated[int, Field(ge=8)]
    """Tokens in a block of the corpus."""
    train_blocks: Positive
    """Blocks for fitting harmonizers and scores."""
    heldout_blocks: Positive
    """Blocks for perplexity, from passages that no training block has."""
    train_questions: Positive
    """Most private training questions a task."""
    eval_questions: Positive
    """Most evaluated questions a task."""


class HarmonizerForm(Block):
    """What the stand-in for one decoder layer is (method section 1)."""

    rank: Positive
    """r: 64 for models up to about 2B parameters, 256 for larger ones."""
    residual: bool
    """Whether the input is added to the output."""
    norm: bool
    """Whether the input of W_down is divided by its root mean square."""


class LayerImportance(Block):
    """The prior: local fits and sensitivities (method section 2)."""

    estimator: Literal["sensitivity", "block_influence", "taylor", "zero"]
    """What the prior scores are made of."""
    calibration_blocks: Positive
    """Training blocks whose hidden states are kept for the local fits; memory grows with it."""
    steps: Annotated[int, Field(ge=0)]
    """Steps of local regression; all layers take each step together. With 0 harmonizers stay identities."""
    batch_tokens: Positive
    """Tokens in a step."""
    lr: Rate
    """AdamW's learning rate."""
    sensitivity_blocks: Positive
    """Training blocks on which a layer's sensitivity is measured."""


class Src(Block):
    """Selective Rank Compression (method section 4)."""

    whiten: bool
    """Truncate what projections give out on the corpus, as SVD-LLM does, or plain matrices, as the paper does."""
    calibration_blocks: Positive
    """Training blocks whose projection inputs are the covariance."""
    channels: Fraction
    """Share of the feed-forward channels that are cut, of every layer whose attention is; the paper cuts none."""


class Dlr(Block):
    """Dynamic LayerReplace (method section 2)."""

    init: Literal["prior", "zero"]
    """Scores start at the prior or at zero."""
    group_size: Annotated[int, Field(ge=2)]
    """N_g: neighbouring layers in a group, half of which is replaced in a sample."""
    settled: Fraction
    """Layers whose p_i is above this leave the draw and are kept; 1 for none, the paper's rule."""
    steps: Annotated[int, Field(ge=0)]
    """Harmonizer updates."""
    batch_blocks: Positive
    """Corpus blocks in a step."""
    lr: Rate
    """AdamW's learning rate for the harmonizers."""
    hidden_weight: Annotated[float, Field(ge=0)]
    """Weight of the error of the last hidden states beside the cross-entropy; 0 is the paper's loss, OT has 30."""
    score_blocks: Positive
    """Training blocks set aside to compare candidates on."""
    score_every: Positive
    """Harmonizer updates between two score updates."""
    score_lr: Annotated[float, Field(gt=0)]
    """η of the score update."""
    candidates: Annotated[int, Field(ge=2)]
    """N_c: distinct networks compared in a score update."""
    after_src: Annotated[int, Field(ge=0)]
    """Harmonizer updates in the finished emulator, by stage `compress`, to make up for what the truncation costs."""


class Distill(Block):
    """Offsite-tuning's distillation, where `method` is distilled."""

    steps: Annotated[int, Field(ge=0)]
    """Updates of the layers that are kept."""
    batch_blocks: Positive
    """Corpus blocks in a step."""
    lr: Rate
    """AdamW's peak learning rate."""
    hidden_weight: Annotated[float, Field(ge=0)]
    """Weight of the hidden states' error beside the cross-entropy."""


class Crash(Block):
    """CRaSh, where `method` is crash."""

    calibration_blocks: Annotated[int, Field(ge=2)]
    """Training blocks on which layers are compared."""


class Gradot(Block):
    """GradOT, where `method` is gradot."""

    calibration_blocks: Positive
    """Training blocks for gradients and the Hessian's factors."""
    lambda_attention: float
    """λ of singular values: how much a part counts whose loss would raise the emulator's own loss."""
    lambda_feed_forward: float
    """λ of feed-forward channels."""


class Tuning(Block):
    """How weights are tuned on a task, for the adapter layers and for full fine-tuning alike (method section 5)."""

    epochs: Positive
    """Passes over the training questions."""
    max_steps: Annotated[int, Field(ge=0)]
    """Stop after so many steps; 0 for no limit."""
    batch_size: Positive
    """Questions in a step."""
    lr: Annotated[
        list[Rate],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
        Field(min_length=1),
    ]
    """AdamW's peak learning rate. Of several the one that is best on a part of the training questions is taken."""
    validation: Fraction
    """Share of the training questions that is held out, to choose between rates and to know when to stop."""
    patience: Annotated[int, Field(ge=0)]
    """Stop after so many epochs without a lower held-out loss; 0 for no held-out part and all epochs."""
    warmup: Fraction
    """Share of the steps in which the rate rises to its peak; then it falls linearly to zero."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's weight decay."""
    clip: Annotated[float, Field(gt=0)]
    """Largest norm of the gradient."""


class OffsiteTuning(Tuning):
    """How the data owner tunes."""

    method: Literal["full", "lora"]
    """What is tuned of the adapter layers: every weight, or PEFT's LoRA inside them."""
    lora_rank: Positive
    """Rank of LoRA's matrices."""
    lora_alpha: Annotated[float, Field(gt=0)]
    """LoRA's scale, over its rank."""
    harmonizers: Literal["frozen", "tuned"]
    """Whether the harmonizers stay as they came, or are tuned along; they don't go back either way."""
    epsilon: Annotated[float, Field(ge=0)]
    """ε of differential privacy for each training question (DP-SGD); 0 for none."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """δ of differential privacy: less than one over the number of questions."""


class Attack(Block):
    """The attacker's budget, where stage `attack` is run."""

    steps: Annotated[int, Field(ge=1)]
    """Updates of every weight in the package."""
    batch_blocks: Positive
    """Corpus blocks in a step."""
    lr: Rate
    """AdamW's peak learning rate."""
    points: Positive
    """Measurements on the way."""
    beside: list[Literal["widened", "without_weights", "uniform"]]
    """What else is attacked beside the package."""
    records: Annotated[int, Field(ge=2)]
    """Most private training questions, and as many held-out ones, that membership is told for."""


class Evaluate(Block):
    """Evaluation by lm-eval."""

    batch_size: Positive
    """Requests in a forward pass."""


class Params(Block):
    """All of params.yaml."""

    alpha: Fraction
    """α: share of the non-adapter layers that harmonizers replace."""
    beta: Fraction
    """β: share of the attention rank that is cut from the other layers (see rank_semantics)."""
    method: Literal["scaleot", "uniform", "distilled", "crash", "gradot"]
    """How the emulator is made."""
    budget: Fraction
    """Most bytes of the emulator as a share of the model's; 0 for what ScaleOT's has at α and β."""
    model: Name
    """The model owner's model: `embedded`, a hub id, or a local folder."""
    tasks: Annotated[list[TaskName], Field(min_length=1)]
    """The data owner's tasks, by lm-eval's names."""
    seed: Annotated[int, Field(ge=0)]
    """Every random draw comes from it."""
    device: Literal["auto", "cpu", "cuda"]
    """Where tensors live."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """What the models compute in; trained weights keep a float32 copy."""
    threads: Annotated[int, Field(ge=0)]
    """CPU threads; 0 for all."""
    launch: Name
    """What starts the stages that train by gradients: `python`, or what starts several processes of one."""
    checkpoint_seconds: Annotated[float, Field(ge=0)]
    """Time between two checkpoints of a long stage."""
    adapter_layers: Positive
    """N_a: layers that are shipped as they are and tuned."""
    adapter_placement: Literal["importance", "ends"]
    """Adapter layers: those of highest score, or OT's bottom and top layers."""
    rank_semantics: Literal["removed", "kept"]
    """Whether β is the share of the rank that is removed or kept."""
    data: Data
    harmonizer: HarmonizerForm
    layer_importance: LayerImportance
    dlr: Dlr
    src: Src
    distill: Distill
    crash: Crash
    gradot: Gradot
    tuning: OffsiteTuning
    full_finetune: Tuning
    evaluate: Evaluate
    attack: Attack

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice; name each once")
        return tasks


def changed(params: Params, values: dict[str, Any]) -> Params:
    """Parameters with some changed, by keys such as `dlr.steps`; UserError names the first that is wrong."""
    data = params.model_dump()
    for key, value in values.items():
        *blocks, name = key.split(".")
        if blocks and blocks[0] not in data:
            raise UserError(f"{key} is no parameter; correct its name or delete it")
        (data[blocks[0]] if blocks else data)[name] = value
    return validate_block(Params, data)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml; UserError names the first key that is wrong, its value and its range."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's folder") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    try:
        return validate_block(Params, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
