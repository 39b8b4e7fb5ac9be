"""The adapter: what the data owner tunes and sends back, and what the owner finds before plugging it in (section 5).

A folder of safetensors and a manifest. Tuned in full it holds every weight of the adapter layers. Tuned by LoRA it is
a plain PEFT adapter too: `PeftModel.from_pretrained(base, folder)` loads it on the real model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import write_json
from scaleot_core.common.runtime import generator
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.compression.low_rank import weight_of
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange import untrusted
from scaleot_core.exchange.manifest import Hash, Manifest, read_checked, write_manifest
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.params import OffsiteTuning, Positive
from scaleot_core.tuning.selection import TuningResult

FORMAT: Final = "scaleot-adapter"
FORMAT_VERSION: Final = 1
FULL, LORA, LORA_CONFIG = "adapter.safetensors", "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."  # of every tensor in a PEFT adapter's file


class Lora(BaseModel):
    """LoRA's two numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: Annotated[int, Field(ge=1, le=65536)]
    alpha: Annotated[float, Field(gt=0)]


class Privacy(BaseModel):
    """The (ε, δ) of differential privacy that was kept to, as the data owner states it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class TuningSummary(BaseModel):
    """How the adapter was tuned; nothing of what it was tuned on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lr: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=0)]
    batch_size: Positive
    privacy: Privacy | None


class AdapterManifest(Manifest):
    """An adapter's manifest."""

    format: Literal["scaleot-adapter"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    package: Hash
    """The package that it was tuned on (`handover.identity`)."""
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024)]
    """The adapter layers."""
    lora: Lora | None
    """LoRA's numbers, or null where every weight was tuned."""
    tuning: TuningSummary


def _linears(model: PreTrainedModel, plan: Plan) -> dict[str, nn.Linear | Conv1D]:
    """The matrices of the adapter layers, by their names in the model, whether PEFT has put LoRA around them or not."""
    layers, path = decoder_layers(model), family(model.config).layers
    return {
        f"{path}.{i}.{name.removesuffix('.base_layer')}": module
        for i in plan.layers("adapter")
        for name, module in layers[i].named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name
    }


def _lora(tuning: OffsiteTuning) -> Lora | None:
    return None if tuning.peft == "none" else Lora(rank=tuning.lora_rank, alpha=tuning.lora_alpha)


def _lora_config(model: PreTrainedModel, plan: Plan, lora: Lora) -> Any:
    """PEFT's configuration for matrices of rank r beside every matrix of the adapter layers."""
    from peft import LoraConfig, TaskType

    linears = _linears(model, plan)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=sorted({name.rpartition(".")[2] for name in linears}),
        layers_to_transform=plan.layers("adapter"),
        layers_pattern=family(model.config).layers.rpartition(".")[2],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linears.values()),
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )


def trainable(model: PreTrainedModel, plan: Plan, tuning: OffsiteTuning, seed: int) -> dict[str, nn.Parameter]:
    """What offsite tuning trains of the adapter layers, by name: every weight, or LoRA matrices put in here."""
    lora = _lora(tuning)
    if lora is None:
        return layer_parameters(model, plan, "adapter")
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_lora_config(model, plan, lora), model)
    found = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for name, parameter in sorted(found.items()):
        if ".lora_A." in name:  # B stays at zero, so that the untuned adapter changes nothing
            drawn = nn.init.kaiming_uniform_(
                torch.empty(parameter.shape), a=math.sqrt(5), generator=generator(seed, "lora", name)
            )
            with torch.no_grad():
                parameter.copy_(drawn)
    return found


def save(
    folder: Path,
    model: PreTrainedModel,
    plan: Plan,
    parameters: Mapping[str, Tensor],
    *,
    package: str,
    tuning: OffsiteTuning,
    tuned: TuningResult,
) -> None:
    """Write an adapter into an existing, empty folder: `parameters` as `trainable` gave them, after tuning."""
    lora = _lora(tuning)
    if lora is None:
        write_tensors(folder / FULL, parameters)
    else:
        named = {f"{PEFT_PREFIX}{name.replace('.default.', '.')}": tensor for name, tensor in parameters.items()}
        write_tensors(folder / LORA, named)
        write_json(folder / LORA_CONFIG, _plain(_lora_config(model, plan, lora)))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package": package,
        "layers": plan.layers("adapter"),
        "lora": lora.model_dump() if lora else None,
        "tuning": {
            "lr": tuned.lr,
            "steps": tuned.steps,
            "batch_size": tuning.batch_size,
            "privacy": None if tuned.epsilon is None else {"epsilon": tuning.epsilon, "delta": tuning.delta},
        },
    }
    write_manifest(folder, manifest)


def _plain(config: Any) -> dict[str, Any]:
    """PEFT's configuration as JSON, the same bytes each time."""
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
    }


def read_manifest(folder: Path) -> AdapterManifest:
    """The manifest of an adapter, after every file that it lists was found whole; UserError otherwise."""
    manifest = read_checked(folder, AdapterManifest, (FULL, LORA, LORA_CONFIG))
    expected = {LORA, LORA_CONFIG} if manifest.lora else {FULL}
    if manifest.files.keys() != expected:
        raise UserError(f"{folder}: its files are {sorted(manifest.files)}; they should be {sorted(expected)}")
    return manifest


def read(folder: Path, package: Package) -> dict[str, Tensor]:
    """Check an adapter and give all weights of the adapter layers as it would have them; UserError otherwise."""
    manifest, model, plan, originals = read_manifest(folder), package.meta_model, package.plan, package.adapter_tensors
    if manifest.package != package.sha256:
        raise UserError(
            f"{folder}: it was tuned on another package ({manifest.package[:12]}…, not {package.sha256[:12]}…)"
        )
    if list(manifest.layers) != plan.layers("adapter"):
        raise UserError(
            f"{folder}: its layers are {list(manifest.layers)}, the adapter layers {plan.layers('adapter')}"
        )
    if manifest.lora is None:
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in originals.items()}
        return untrusted.read_untrusted_tensors({folder / FULL: expected})
    _check_lora_config(folder / LORA_CONFIG, _plain(_lora_config(model, plan, manifest.lora)))
    rank, linears = manifest.lora.rank, _linears(model, plan)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, module in linears.items():
        out, into = weight_of(module)[0].shape
        shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = ((rank, into), module.weight.dtype)
        shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = ((out, rank), module.weight.dtype)
    given = untrusted.read_untrusted_tensors({folder / LORA: shapes})
    tensors = {name: tensor.detach().clone() for name, tensor in originals.items()}
    for name, module in linears.items():
        a, b = (given[f"{PEFT_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
        change = manifest.lora.alpha / rank * (b @ a)
        weight = tensors[f"{name}.weight"]
        change = (change.T if isinstance(module, Conv1D) else change).to(weight.device)
        tensors[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
        if not tensors[f"{name}.weight"].isfinite().all():
            raise UserError(f"{folder}: {name!r} would have numbers that are not finite; it is of no use")
    return tensors


def _check_lora_config(file: Path, expected: dict[str, Any]) -> None:
    """PEFT would follow its file to the letter: it must say what ours says, and nothing that another version adds."""
    given = untrusted.read_untrusted_json(file)
    if not isinstance(given, dict):
        raise UserError(f"{file}: a JSON object is needed; fetch it again")
    expected = {**expected, "peft_version": given.get("peft_version")}
    for key in sorted(expected.keys() | given.keys()):
        if given.get(key) != expected.get(key) and not (key not in expected and given[key] in (None, False, [], {})):
            raise UserError(f"{file}: `{key}` is not what such an adapter has; don't load it")


@dataclass(frozen=True)
class LayerChange:
    """How far one layer moved from what was shipped."""

    layer: int
    relative: float
    """Norm of the change over the norm of what was shipped, all weights of the layer together."""
    outlier: float
    """Largest change of one weight over the root mean square of all in its tensor, the largest of all tensors."""


def layer_changes(
    plan: Plan, shipped: Mapping[str, Tensor], tuned: Mapping[str, Tensor], path: str
) -> list[LayerChange]:
    """Every adapter layer's movement; `path` is that of the decoder layers in the model."""
    found = []
    for i in plan.layers("adapter"):
        before = {name: tensor.double() for name, tensor in shipped.items() if name.startswith(f"{path}.{i}.")}
        changes = [tuned[name].double() - tensor for name, tensor in before.items()]
        size, moved = (math.sqrt(sum(float(t.square().sum()) for t in part)) for part in (before.values(), changes))
        peaks = [float(t.abs().max() / t.square().mean().sqrt()) for t in changes if t.any()]
        found.append(LayerChange(i, moved / size if size else math.inf if moved else 0.0, max(peaks, default=0.0)))
    return found


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that came back, found sound."""

    tuned: dict[str, Tensor]
    """Every weight of the adapter layers as it is to be plugged in, by its name in the model."""
    layer_changes: list[LayerChange]


def check_adapter(folder: Path, package: Package) -> CheckedAdapter:
    """Check an adapter against the package that was shipped; UserError where either is not sound.

    No weights but the adapter layers' are loaded.
    """
    tuned = read(folder, package)
    path = family(package.config).layers
    return CheckedAdapter(tuned, layer_changes(package.plan, package.adapter_tensors, tuned, path))
