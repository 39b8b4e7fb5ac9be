"""LoRA in an emulator: PEFT's matrices beside those that it has, whatever their form (method section 8)."""

import math
import warnings
from typing import Any

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.common.random import generator
from scaleot_core.compression.low_rank import FusedProjection, LowRankLinear, features
from scaleot_core.compression.plan import DECODER_KINDS, Plan, layers_of
from scaleot_core.models.families import family, feed_forward_paths, projection_paths
from scaleot_core.settings import LoraForm


class LoraOnFactors(peft_lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA layer for modules that aren't one Linear."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return features(module)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype


def lora_layers(plan: Plan, form: LoraForm) -> list[int]:
    """List the decoder layers that LoRA is put into; UserError where there is none."""
    layers = layers_of(plan, "adapter") if form.layers == "adapter" else layers_of(plan, *DECODER_KINDS)
    if not layers:
        what = "adapter layer" if form.layers == "adapter" else "decoder layer"
        raise UserError(f"LoRA: the package has no {what} to put it into; it needs one that keeps some")
    return layers


def target_modules(config: PretrainedConfig, form: LoraForm) -> list[str]:
    """Return the paths from a decoder layer to the matrices that LoRA is put beside."""
    return projection_paths(config) + (feed_forward_paths(config) if form.modules == "all" else [])


def lora_features(model: PreTrainedModel, plan: Plan, form: LoraForm) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of every matrix that LoRA is to be put beside, by its name.

    The emulator needs no weights. UserError for a rank above that of a matrix.
    """
    path, shapes = family(model.config).layers, {}
    for i in lora_layers(plan, form):
        for module in target_modules(model.config, form):
            name = f"{path}.{i}.{module}"
            shapes[name] = into, out = features(model.get_submodule(name))
            if form.rank > min(into, out):
                raise UserError(
                    f"LoRA of rank {form.rank}: {name!r} takes {into} numbers and gives {out}; "
                    f"the rank is at most {min(into, out)} there"
                )
    return shapes


def peft_config(config: PretrainedConfig, layers: list[int], form: LoraForm) -> LoraConfig:
    """Make PEFT's configuration of this LoRA on the real model."""
    names = family(config)
    return LoraConfig(
        r=form.rank,
        lora_alpha=form.alpha,  # type: ignore[arg-type]
        target_modules=sorted(target_modules(config, form)),
        layers_to_transform=layers,
        layers_pattern=names.layers.rpartition(".")[2],
        fan_in_fan_out=names.transposed,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )


def insert_lora(model: PreTrainedModel, plan: Plan, form: LoraForm, seed: int) -> dict[str, nn.Parameter]:
    """Put LoRA into an emulator, in place, and return its parameters, frozen, by their names in the model.

    B is zero, so the emulator computes what it did. Each A is drawn as PEFT does (Kaiming-uniform), from the seed and
    its name. UserError for a rank above that of a matrix, or where no layer is left.
    """
    lora_features(model, plan, form)
    config: Any = peft_config(model.config, lora_layers(plan, form), form)
    config._register_custom_module({LowRankLinear: LoraOnFactors, FusedProjection: LoraOnFactors})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # which serves merging alone
        inject_adapter_in_model(config, model)
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for name, parameter in sorted(factors.items()):
        if ".lora_A." in name:
            drawn = nn.init.kaiming_uniform_(
                torch.empty(parameter.shape), a=math.sqrt(5), generator=generator(seed, "lora", name)
            )
            with torch.no_grad():
                parameter.copy_(drawn)
    return factors


def remove_lora(model: PreTrainedModel) -> None:
    """Take LoRA out of a model, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, peft_lora.LoraLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
