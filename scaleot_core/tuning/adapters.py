"""What is tuned, whole adapter layers or LoRA: in the emulator, and plugged into the real model."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.compression.channels import channel_rows
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.compression.low_rank import features
from scaleot_core.compression.plan import Plan, layers_of
from scaleot_core.models.families import family, feed_forward_paths
from scaleot_core.settings import LoraForm

PEFT_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<matrix>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class TunedLayers:
    """The paper's adapters: every weight of the adapter layers, by its name in the model."""

    weights: Mapping[str, Tensor]

    @property
    def changes(self) -> list[str]:
        """Name the real model's weights that the adapter changes."""
        return list(self.weights)

    def plugged(self, name: str, base: Tensor) -> Tensor:
        """Compute one weight of the plug-in from the real model's, in its dtype: base + tuned − shipped.

        What was shipped is the base in the package's dtype, so a number that tuning left alone stays as it is even
        where the base has more digits than the package. UserError for numbers that are not finite.
        """
        tuned = self.weights[name].to(base.device)
        if tuned.dtype == base.dtype:
            return _finite(name, tuned)
        change = tuned.float() - base.to(tuned.dtype).float()
        return _finite(name, (base.float() + change).to(base.dtype))


@dataclass(frozen=True)
class TunedLora:
    """LoRA: A (r, in) and B (out, r) of every matrix that has it, by the matrix's name in the model."""

    form: LoraForm
    factors: Mapping[str, tuple[Tensor, Tensor]]
    transposed: bool
    """Whether the real model's matrices are stored as (in, out)."""

    @classmethod
    def from_peft(cls, form: LoraForm, tensors: Mapping[str, Tensor], config: PretrainedConfig) -> Self:
        """Pair the tensors A and B that PEFT names, in a model (`x.lora_A.default.weight`) or as `to_peft` does."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if match := PEFT_FACTOR.fullmatch(name):
                parts.setdefault(match["matrix"], {})[match["part"]] = tensor
        return cls(form, {name: (pair["A"], pair["B"]) for name, pair in parts.items()}, family(config).transposed)

    def to_peft(self) -> dict[str, Tensor]:
        """Name the factors as the file of a PEFT adapter does: `base_model.model.x.lora_A.weight`."""
        return {
            f"base_model.model.{name}.lora_{part}.weight": factor
            for name, factors in self.factors.items()
            for part, factor in zip("AB", factors, strict=True)
        }

    @property
    def changes(self) -> list[str]:
        """Name the real model's weights that the adapter changes."""
        return [f"{name}.weight" for name in self.factors]

    def change(self, name: str) -> Tensor:
        """Compute what is added to one matrix (out, in), in float32: alpha / r · B A."""
        a, b = (factor.float() for factor in self.factors[name])
        return self.form.alpha / self.form.rank * (b @ a)

    def plugged(self, name: str, base: Tensor) -> Tensor:
        """Compute one weight of the plug-in from the real model's, in its dtype: base + alpha / r · B A.

        UserError for numbers that are not finite.
        """
        change = self.change(name.removesuffix(".weight")).to(base.device)
        return _finite(name, (base.float() + (change.T if self.transposed else change)).to(base.dtype))


TunedAdapter = TunedLayers | TunedLora


def trainable(model: PreTrainedModel, plan: Plan, lora: LoraForm | None, seed: int) -> dict[str, nn.Parameter]:
    """Return what offsite tuning trains of an emulator, by name: the adapter layers, or LoRA, which is inserted here.

    UserError where the emulator has nothing of the kind.
    """
    if lora is None:
        if not layers_of(plan, "adapter"):
            raise UserError("adapters `layers`: the package has no adapter layer; tune it with `lora`")
        return layer_parameters(model, plan, "adapter")
    from scaleot_core.tuning.lora import insert_lora

    return insert_lora(model, plan, lora, seed)


def tuned_layers(plan: Plan, lora: LoraForm | None) -> list[int]:
    """List the decoder layers that `trainable` trains; UserError where LoRA finds none."""
    from scaleot_core.tuning.lora import lora_layers

    return layers_of(plan, "adapter") if lora is None else lora_layers(plan, lora)


def _finite(name: str, weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise UserError(f"{name!r} would have numbers that are not finite; the adapter is of no use")
    return weight


def fit_to_model(adapter: TunedLora, model: PreTrainedModel, channels: Mapping[int, Tensor]) -> TunedLora:
    """Give LoRA the shapes of the real model's matrices; weights aren't needed.

    `channels` has, by layer, the indices of the feed-forward channels that the emulator kept; the rows and columns of
    the others become zeros. UserError where they don't fit.
    """
    names, factors = family(model.config), dict(adapter.factors)
    for i, kept in channels.items():
        for inner in feed_forward_paths(model.config):
            name = f"{names.layers}.{i}.{inner}"
            if name in factors:
                a, b = factors[name]
                into, out = features(model.get_submodule(name))
                if inner == names.feed_forward_out:
                    factors[name] = _spread(a.T, kept, into).T.contiguous(), b
                else:
                    fused = names.feed_forward_in[inner]
                    factors[name] = a, _spread(b, channel_rows(kept, out // fused, fused), out)
    for name, (a, b) in factors.items():
        into, out = features(model.get_submodule(name))
        if (a.shape[1], b.shape[0]) != (into, out):
            raise UserError(
                f"LoRA of {name!r} is for {a.shape[1]} inputs and {b.shape[0]} outputs, the real model has {into} and "
                f"{out}, and which of its channels were kept isn't known"
            )
    return replace(adapter, factors=factors)


def _spread(rows: Tensor, at: Tensor, count: int) -> Tensor:
    """Put rows (f', r) at their indices among `count` rows, the others zeros."""
    if len(rows) != len(at) or not bool(((at >= 0) & (at < count)).all()) or len(at.unique()) < len(at):
        raise UserError(f"the {len(at)} channels that were kept are not those of LoRA with {len(rows)} of {count}")
    spread = rows.new_zeros(count, rows.shape[1])
    spread[at.to(rows.device)] = rows
    return spread


@torch.no_grad()
def plug_in(model: PreTrainedModel, plan: Plan, adapter: TunedAdapter) -> None:
    """Plug an adapter into the real model, in place.

    UserError where it has other weights than the adapter layers have, or one would have numbers that are not finite.
    """
    if isinstance(adapter, TunedLayers):
        _check_layers(model, plan, adapter)
    for name in adapter.changes:
        weight = model.get_parameter(name)
        weight.copy_(adapter.plugged(name, weight))


def _check_layers(model: PreTrainedModel, plan: Plan, adapter: TunedLayers) -> None:
    """Raise UserError, naming a tensor, unless an adapter has exactly the weights of the adapter layers."""
    parameters = layer_parameters(model, plan, "adapter")
    for name in sorted(parameters.keys() | adapter.weights.keys()):
        parameter, tuned = parameters.get(name), adapter.weights.get(name)
        if parameter is None or tuned is None or parameter.shape != tuned.shape:
            raise UserError(
                f"adapter tensor {name!r} is missing, foreign or of another shape; tune the adapter on this package"
            )


@contextmanager
def plugged_in(model: PreTrainedModel, plan: Plan, adapter: TunedAdapter) -> Iterator[None]:
    """Plug an adapter into the real model for the length of a block, then restore the model.

    A copy of the changed weights is kept meanwhile: with LoRA in every layer nearly the whole model.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in adapter.changes if name in parameters}
    plug_in(model, plan, adapter)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_parameter(name).copy_(weight)


@contextmanager
def tuned_emulator(model: PreTrainedModel, plan: Plan, adapter: TunedAdapter) -> Iterator[None]:
    """Put an adapter into the emulator that it was tuned in for the length of a block, then restore the emulator."""
    if isinstance(adapter, TunedLayers):
        with plugged_in(model, plan, adapter):
            yield
        return
    from scaleot_core.tuning.lora import insert_lora, remove_lora

    inserted = TunedLora.from_peft(adapter.form, insert_lora(model, plan, adapter.form, seed=0), model.config)
    try:
        with torch.no_grad():
            for name, factors in inserted.factors.items():
                for parameter, factor in zip(factors, adapter.factors[name], strict=True):
                    parameter.copy_(factor)
        yield
    finally:
        remove_lora(model)
