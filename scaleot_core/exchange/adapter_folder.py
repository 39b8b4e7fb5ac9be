"""The adapter folder: what the data owner sends back, read as what comes from a stranger (method section 5).

Safetensors and a manifest: every weight of the adapter layers, or LoRA as a PEFT adapter. Unless it lies on pruned
channels, `PeftModel.from_pretrained(base, folder)` loads that on the real model; `scaleot plug --as-lora` writes it for
the real model in any case.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError, printable
from scaleot_core.common.files import write_json
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange.manifest import MOST_LAYERS, Hash, Manifest, read_checked, write_manifest
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.untrusted import read_untrusted_json, read_untrusted_tensors
from scaleot_core.models.families import family
from scaleot_core.settings import LoraForm, OffsiteTuning, Positive
from scaleot_core.tuning.adapters import TunedAdapter, TunedLayers, TunedLora, tuned_layers
from scaleot_core.tuning.selection import TuningResult

FORMAT: Final = "scaleot-adapter"
FORMAT_VERSION: Final = 2
LAYERS, LORA, LORA_CONFIG = "adapter.safetensors", "adapter_model.safetensors", "adapter_config.json"
LORA_SETTINGS: Final = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)  # that an adapter states: those that every version of PEFT knows, and other readers of its adapters


class Privacy(BaseModel):
    """The (ε, δ) of differential privacy that tuning kept to, as the data owner states it."""

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
    format_version: Literal[2] = FORMAT_VERSION
    package: Hash
    """SHA-256 of the manifest of the package that it was tuned on."""
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=MOST_LAYERS)]
    """The decoder layers that were tuned."""
    lora: LoraForm | None
    """LoRA's form; null where every weight of those layers was tuned."""
    tuning: TuningSummary


def save(
    folder: Path,
    package: Package,
    parameters: Mapping[str, Tensor],
    *,
    lora: LoraForm | None,
    tuning: OffsiteTuning,
    tuned: TuningResult,
) -> None:
    """Write an adapter into an existing, empty folder; `parameters` are what `trainable` returned, after tuning."""
    layers = tuned_layers(package.plan, lora)
    if lora is None:
        write_tensors(folder / LAYERS, parameters)
    else:
        save_peft(folder, package.config, TunedLora.from_peft(lora, parameters, package.config), layers=layers)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package": package.sha256,
        "layers": layers,
        "lora": lora.model_dump() if lora else None,
        "tuning": {
            "lr": tuned.lr,
            "steps": tuned.steps,
            "batch_size": tuning.batch_size,
            "privacy": None if tuned.epsilon is None else {"epsilon": tuning.epsilon, "delta": tuning.delta},
        },
    }
    write_manifest(folder, manifest)


def save_peft(folder: Path, config: PretrainedConfig, adapter: TunedLora, *, layers: list[int]) -> None:
    """Write LoRA as a plain PEFT adapter into an existing, empty folder."""
    write_tensors(folder / LORA, adapter.to_peft())
    fields = _lora_config(config, layers, adapter.form)
    write_json(folder / LORA_CONFIG, {key: fields[key] for key in LORA_SETTINGS})


def _lora_config(config: PretrainedConfig, layers: list[int], form: LoraForm) -> dict[str, Any]:
    """Return all of PEFT's configuration as JSON has it; settings that are left at their default vary with PEFT."""
    from scaleot_core.tuning.lora import peft_config

    fields = peft_config(config, layers, form).to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in fields.items()
        if key != "peft_version"
    }


def read_manifest(folder: Path, *, links: bool = False) -> AdapterManifest:
    """Read an adapter's manifest and check every file that it lists; UserError for any fault."""
    manifest = read_checked(folder, AdapterManifest, (LAYERS, LORA, LORA_CONFIG), links=links)
    expected = {LORA, LORA_CONFIG} if manifest.lora else {LAYERS}
    if manifest.files.keys() != expected:
        raise UserError(f"{folder}: its files are {sorted(manifest.files)}; they should be {sorted(expected)}")
    return manifest


def read(folder: Path, package: Package, *, links: bool = False) -> TunedAdapter:
    """Read an adapter; UserError where it wasn't tuned on this package, or isn't sound."""
    manifest, model, plan = read_manifest(folder, links=links), package.meta_model, package.plan
    if manifest.package != package.sha256:
        raise UserError(
            f"{folder}: it was tuned on another package ({manifest.package[:12]}…, not {package.sha256[:12]}…)"
        )
    try:
        layers = tuned_layers(plan, manifest.lora)
        if list(manifest.layers) != layers:
            raise UserError(f"its layers are {list(manifest.layers)}, those of such an adapter {layers}")
        if manifest.lora is None:
            weights = layer_parameters(model, plan, "adapter")
            expected = {name: (tuple(p.shape), p.dtype) for name, p in weights.items()}
            return TunedLayers(read_untrusted_tensors({folder / LAYERS: expected}))
        return _read_lora(folder, model, plan, manifest.lora, links=links)
    except UserError as error:
        raise error if str(error).startswith(str(folder)) else UserError(f"{folder}: {error}") from None


def _read_lora(folder: Path, model: PreTrainedModel, plan: Plan, form: LoraForm, *, links: bool) -> TunedLora:
    from scaleot_core.tuning.lora import lora_features, lora_layers

    _check_lora_config(folder / LORA_CONFIG, _lora_config(model.config, lora_layers(plan, form), form), links=links)
    dtype = next(model.parameters()).dtype
    with torch.device("meta"):
        empty = TunedLora(
            form,
            {
                name: (torch.empty(form.rank, into), torch.empty(out, form.rank))
                for name, (into, out) in lora_features(model, plan, form).items()
            },
            family(model.config).transposed,
        )
    expected = {name: (tuple(factor.shape), dtype) for name, factor in empty.to_peft().items()}
    adapter = TunedLora.from_peft(form, read_untrusted_tensors({folder / LORA: expected}), model.config)
    for name in adapter.factors:
        if not adapter.change(name).to(dtype).isfinite().all():
            raise UserError(f"what it changes in {name!r} has numbers that are not finite; it is of no use")
    return adapter


def _check_lora_config(file: Path, expected: dict[str, Any], *, links: bool) -> None:
    """Raise UserError unless PEFT's configuration, which PEFT would follow to the letter, means what ours does.

    Whole, as a version of PEFT writes it, or in part. A setting of another version than this one may be unset, or a
    number, which turns nothing on and names nothing.
    """
    stated = read_untrusted_json(file, links=links)
    if not isinstance(stated, dict):
        raise UserError(f"{file}: a JSON object is needed; fetch it again")
    for key in sorted({*LORA_SETTINGS, *stated} - {"peft_version"}):
        value = stated.get(key)
        if key in expected:
            is_sound = value == expected[key]
        else:
            is_sound = value in (None, False, [], {}) or (isinstance(value, int | float) and value is not True)
        if not is_sound:
            raise UserError(f"{file}: `{printable(key)}` is not what such an adapter has; don't load it")
