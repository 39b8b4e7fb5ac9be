"""The emulator: a model whose layers are what a plan says, in place (method section 3)."""

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.tensors import Shapes
from scaleot_core.compression.channels import channels_of, prune_channels
from scaleot_core.compression.harmonizer import Harmonizer
from scaleot_core.compression.plan import DECODER_KINDS, LayerKind, Plan, layers_of, shared_layers
from scaleot_core.compression.rank_compression import compress_layer
from scaleot_core.compression.svd import Decompose, empty_factors
from scaleot_core.models.families import attention, decoder_layers, family
from scaleot_core.models.forward import Removed
from scaleot_core.models.loading import empty_model


def apply_plan(model: PreTrainedModel, plan: Plan, decompose: Decompose) -> None:
    """Replace a model's layers by the modules that the plan asks for, in place and frozen: [A, E*].

    Of pruned layers the first channels are kept. ValueError for a cut that the model has no room for.
    """
    layers = decoder_layers(model)
    size, in_tuple = model.config.hidden_size, family(model.config).in_tuple
    for i, planned in enumerate(plan):
        if planned.harmonizer_rank is not None:
            like = next(layers[i].parameters())
            harmonizer = Harmonizer(size, planned.harmonizer_rank, in_tuple=in_tuple)
            layers[i] = harmonizer.to(device=like.device, dtype=like.dtype)
        elif planned.kind == "removed":
            layers[i] = Removed(in_tuple=in_tuple)
        if planned.ranks:
            compress_layer(model, i, ranks=planned.ranks, decompose=decompose)
        if planned.channels is not None:
            if planned.channels > channels_of(model, i):
                raise ValueError(f"layer {i} has {channels_of(model, i)} feed-forward channels, not {planned.channels}")
            prune_channels(model, i, torch.arange(planned.channels))
    for i, source in shared_layers(plan).items():
        layers[i] = copy.deepcopy(layers[source])
    number_attention(model, {i: layers[i] for i in layers_of(plan, *DECODER_KINDS)})
    model.requires_grad_(False)


def number_attention(model: PreTrainedModel, layers: Mapping[int, nn.Module]) -> None:
    """Number the decoder layers, by index, that have attention: a key-value cache expects them to count from 0.

    Where `layer_types` differ, as in Gemma, each layer takes the next number whose place in the cache has its type.
    Number 0 is always taken, since the cache reads its length there.
    """
    types = getattr(model.config, "layer_types", None) or [""] * len(decoder_layers(model))
    if types[0] not in {types[i] for i in layers}:
        types = [""] * len(types)
    numbers = {kind: iter([i for i, other in enumerate(types) if other == kind]) for kind in set(types)}
    for i, layer in sorted(layers.items()):
        attention(model.config, layer).layer_idx = next(numbers[types[i]])  # type: ignore[assignment]


def part_of(name: str, layers_path: str, plan: Plan) -> str:
    """Name the file that a tensor belongs in: the kind of its layer, or `base` for embeddings, norm and head."""
    if not name.startswith(f"{layers_path}."):
        return "base"
    return plan[int(name.removeprefix(f"{layers_path}.").split(".")[0])].kind


def layer_parameters(model: PreTrainedModel, plan: Plan, kind: LayerKind) -> dict[str, nn.Parameter]:
    """Collect the parameters of the layers of one kind, by name. Offsite tuning trains the adapter layers'."""
    path = family(model.config).layers
    return {name: p for name, p in model.named_parameters() if part_of(name, path, plan) == kind}


PARTS = ("base", "adapter", "harmonizer", "compressed")  # a package's files of tensors


def package_tensors(model: PreTrainedModel, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield the (name, tensor) pairs that a package stores; tied heads and shared layers appear once."""
    path, tied = family(model.config).layers, set(model.all_tied_weights_keys)
    return ((n, t) for n, t in model.state_dict().items() if n not in tied and part_of(n, path, plan) in PARTS)


def meta_emulator(config: PretrainedConfig, plan: Plan, *, buffers_too: bool) -> PreTrainedModel:
    """Build an emulator without weights; buffers are computed, unless they too are to take no memory."""
    model = empty_model(config, buffers_too=buffers_too)
    with init_empty_weights(include_buffers=buffers_too):
        apply_plan(model, plan, empty_factors)
    return model


def tensor_shapes(model: PreTrainedModel, plan: Plan) -> dict[str, Shapes]:
    """Return the names, shapes and dtypes of the tensors in each file of a package."""
    path = family(model.config).layers
    shapes: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, tensor in package_tensors(model, plan):
        shapes.setdefault(part_of(name, path, plan), {})[name] = (tuple(tensor.shape), tensor.dtype)
    return dict(shapes)


def assemble(
    config: PretrainedConfig, plan: Plan, tensors: Iterable[tuple[str, Tensor]], *, device: torch.device
) -> PreTrainedModel:
    """Put an emulator together, frozen, from the tensors of a package."""
    model, state = meta_emulator(config, plan, buffers_too=False), dict(tensors)
    path, shared = family(config).layers, shared_layers(plan)
    for source in set(shared.values()):  # one copy for all that share it: an adapter layer's own will move
        prefix = f"{path}.{source}."
        copies = {name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}
        for i in (i for i, other in shared.items() if other == source):
            state |= {f"{path}.{i}.{name}": tensor for name, tensor in copies.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)
