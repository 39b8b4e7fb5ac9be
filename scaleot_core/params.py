"""params.yaml as checked values: every key is a field here or in a block of `settings`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator

from scaleot_core.common.errors import UserError
from scaleot_core.common.validation import Block, StrictLoader, validate_block
from scaleot_core.settings import (
    AdapterKind,
    Attack,
    Channels,
    Count,
    Data,
    Distill,
    Dlr,
    Evaluate,
    Fraction,
    HarmonizerForm,
    LayerImportance,
    Lora,
    Name,
    OffsiteTuning,
    RankCompression,
    Threads,
    Tuning,
)

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Params(Block):
    """All of params.yaml."""

    alpha: Fraction = 0.25
    """α, the share of the non-adapter layers that harmonizers replace"""
    beta: Fraction = 0.8
    """β, the share of the attention rank that is cut in the other non-adapter layers"""
    method: Literal["scaleot", "channels", "uniform", "distilled", "crash", "gradot"] = "scaleot"
    """how the emulator is built"""
    max_bytes_ratio: Fraction = 0.0
    """most bytes of the emulator over the model's; 0 for what alpha and beta give"""
    model: Name = "embedded"
    """embedded (SmolLM2-135M-Instruct), a hub id, or a local folder"""
    model_revision: str = ""
    """commit, tag or branch of the model on the hub; empty for the newest"""
    tasks: Annotated[list[TaskName], Field(min_length=1)] = ["piqa", "commonsense_qa_cloze"]
    """lm-eval task names, each tuned on its own"""
    adapters: Annotated[list[AdapterKind], Field(min_length=1)] = ["layers", "lora"]
    """what is tuned, each on its own: the adapter layers, as in the paper, or LoRA in every layer that is there"""
    adapter_layers: Count = 4
    """N_a, decoder layers that are shipped as they are; `layers` among the adapters tunes them, and needs one"""
    adapter_placement: Literal["importance", "ends"] = "importance"
    """method scaleot: adapter layers are those of highest score, or OT's bottom and top layers; the others: ends"""
    seed: Count = 0
    """every random draw comes from it"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """what models compute in; trained weights stay float32"""
    threads: Threads = 0
    """CPU threads; 0 for all that this process may use, and at most OMP_NUM_THREADS"""
    launch: Name = "python"
    """python, or `accelerate launch --num_processes 4`, or on CPUs `torchrun --nproc_per_node 4`"""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 180
    """seconds between two checkpoints of a long stage"""
    data: Data = Data()
    harmonizer: HarmonizerForm = HarmonizerForm()
    layer_importance: LayerImportance = LayerImportance()
    dlr: Dlr = Dlr()
    rank_compression: RankCompression = RankCompression()
    channels: Channels = Channels()
    distill: Distill = Distill()
    offsite_tune: OffsiteTuning = OffsiteTuning()
    lora: Lora = Lora()
    full_finetune: Tuning = Tuning()
    evaluate: Evaluate = Evaluate()
    attack: Attack = Attack()

    @field_validator("tasks", "adapters")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("one is named twice; name each once")
        return names

    @field_validator("adapter_layers")
    @classmethod
    def _some_to_tune(cls, count: int, info: ValidationInfo) -> int:
        if not count and "layers" in info.data.get("adapters", []):
            raise ValueError("the adapters `layers` need at least 1; or take them off `adapters`")
        return count

    @field_validator("lora")
    @classmethod
    def _some_to_put_it_into(cls, lora: Lora, info: ValidationInfo) -> Lora:
        if lora.layers == "adapter" and not info.data.get("adapter_layers", 1):
            raise ValueError("with adapter_layers = 0 no layer is there for LoRA; set lora.layers to all")
        return lora

    @field_validator("lora")
    @classmethod
    def _rates_can_be_compared(cls, lora: Lora, info: ValidationInfo) -> Lora:
        tuning = info.data.get("offsite_tune", OffsiteTuning())
        if len(lora.lr) > 1 and (tuning.epsilon or not tuning.validation_fraction):
            raise ValueError(
                "held-out examples choose one of several lr: set offsite_tune.validation_fraction above 0 and "
                "offsite_tune.epsilon to 0, or give one lr"
            )
        return lora


def changed(params: Params, values: dict[str, Any]) -> Params:
    """Parameters with some changed, by keys such as `dlr.steps`; UserError names the first that is wrong."""
    data = params.model_dump()
    for key, value in values.items():
        *blocks, name = key.split(".")
        if blocks and blocks[0] not in data:
            raise UserError(f"{key} is no parameter; correct its name or delete it")
        (data[blocks[0]] if blocks else data)[name] = value
    return _validated(data)


def _validated(data: Any) -> Params:
    """All parameters; the UserError says key and value itself, since they may come from elsewhere than params.yaml."""
    try:
        return validate_block(Params, data)
    except UserError as error:
        raise UserError(str(error)) from None


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml; UserError names the first key that is wrong, its value and its range."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's folder") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    try:
        params = _validated(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if missing := next(_missing(params), None):  # DVC watches the file: what isn't there couldn't be noticed
        raise UserError(f"{path}: {missing} is missing; add it (params.yaml in the repository shows how)")
    return params


def _missing(block: Block, prefix: str = "") -> Iterator[str]:
    """Yield the names, such as `dlr.steps`, of parameters that were left to their defaults."""
    for name in type(block).model_fields:
        value = getattr(block, name)
        if name not in block.model_fields_set:
            yield f"{prefix}{name}"
        elif isinstance(value, Block):
            yield from _missing(value, f"{prefix}{name}.")
