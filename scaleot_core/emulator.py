"""The emulator: a model whose layers are what a plan says, in place (method section 3); adapters plugged in."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.decomposition import Decompose
from scaleot_core.errors import UserError
from scaleot_core.families import attention, decoder_layers, family
from scaleot_core.harmonizer import Harmonizer
from scaleot_core.plan import WHOLE, Kind, Plan
from scaleot_core.rank_compression import channels_of, compress_layer, keep_channels


def stand_in(
    model: PreTrainedModel, plan: Plan, decompose: Decompose, channels: Mapping[int, Tensor] | None = None
) -> None:
    """Give a model's layers the modules that the plan asks for, in place and frozen: [A, E*].

    `channels` are the feed-forward channels that a layer keeps, where it is cut there. ValueError for a cut that the
    model has no room for.
    """
    layers, channels = decoder_layers(model), channels or {}
    size = model.config.hidden_size
    for i, kind in enumerate(plan.kinds):
        if kind == "harmonizer":
            like = next(layers[i].parameters())
            layers[i] = Harmonizer(size, plan.harmonizer).to(device=like.device, dtype=like.dtype)
        elif kind == "removed":
            layers[i] = Removed()
        elif kind == "compressed":
            compress_layer(model, i, ranks=plan.ranks(model, i), decompose=decompose)
            if cut := plan.cuts.get(i):
                if cut.channels > channels_of(model, i):
                    raise ValueError(f"layer {i} has {channels_of(model, i)} feed-forward channels, not {cut.channels}")
                keep_channels(model, i, channels.get(i, torch.arange(cut.channels)))
    for i, other in plan.like.items():
        layers[i] = copy.deepcopy(layers[other])
    number_attention(model, [layers[i] for i, kind in enumerate(plan.kinds) if kind in WHOLE])
    model.requires_grad_(False)


def number_attention(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Number the decoder layers that have attention, in their order: a key-value cache counts those that use it."""
    for number, layer in enumerate(layers):
        attention(model.config, layer).layer_idx = number  # type: ignore[assignment]


class Removed(nn.Module):
    """Where a layer was: hidden states (B, T, D) go through as they are."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return hidden_states


def part_of(name: str, layers_path: str, plan: Plan) -> str:
    """The file that a tensor belongs in: by the kind of its layer, or `base` for embeddings, norm and head."""
    if not name.startswith(f"{layers_path}."):
        return "base"
    return plan.kinds[int(name.removeprefix(f"{layers_path}.").split(".")[0])]


def layer_parameters(model: PreTrainedModel, plan: Plan, kind: Kind) -> dict[str, nn.Parameter]:
    """The parameters of the layers of one kind, by their names in the model. Offsite tuning trains the adapters'."""
    path = family(model.config).layers
    return {name: p for name, p in model.named_parameters() if part_of(name, path, plan) == kind}


def plug_in(model: PreTrainedModel, plan: Plan, tensors: dict[str, Tensor], kind: Kind = "adapter") -> None:
    """Put tuned tensors into the layers of one kind: adapters into the emulator or the real model, in place.

    They must be all that the plan's layers of that kind have and nothing else; UserError names one that isn't.
    """
    parameters = layer_parameters(model, plan, kind)
    for name in sorted(parameters.keys() | tensors.keys()):
        here, given = parameters.get(name), tensors.get(name)
        if here is None or given is None or here.shape != given.shape:
            raise UserError(
                f"{kind} tensor {name!r} is missing, foreign or of another shape; tune the adapter on this package"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
