"""Sizes of a model's decoder layers, and by arithmetic those of an emulator: no model is built to count its bytes.

All decoder layers of a supported family have equal shapes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from scaleot_core.compression.channels import channels_of
from scaleot_core.compression.low_rank import weight_of
from scaleot_core.compression.plan import Layer, Plan
from scaleot_core.compression.rank_compression import matrix_shapes
from scaleot_core.models.families import decoder_layers, family


@dataclass(frozen=True)
class LayerShapes:
    """What each of a model's decoder layers has, and what lies outside of them, in numbers (not bytes)."""

    layers: int
    """Decoder layers."""
    hidden_size: int
    projections: Mapping[str, tuple[tuple[int, int], ...]]
    """Shapes (out, in) of the matrices in each attention projection, by its name in the attention."""
    channels: int
    """Feed-forward channels."""
    channel_size: int
    """Numbers that one channel has in all feed-forward matrices and biases."""
    layer_size: int
    outside: int
    """Numbers in embeddings, norm and head; tied ones once."""
    itemsize: int
    """Bytes of a number."""

    @property
    def model_bytes(self) -> int:
        """Bytes of the whole model."""
        return (self.outside + self.layers * self.layer_size) * self.itemsize


def layer_shapes(model: PreTrainedModel) -> LayerShapes:
    """Read the sizes of a model, which needs no weights."""
    names, layer = family(model.config), decoder_layers(model)[0]
    channel_size = weight_of(layer.get_submodule(names.feed_forward_out))[0].shape[0]
    for into_name, fused in names.feed_forward_in.items():
        weight, bias = weight_of(layer.get_submodule(into_name))
        channel_size += fused * (weight.shape[1] + (bias is not None))
    tied = set(model.all_tied_weights_keys)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items() if name not in tied}
    inside = sum(size for name, size in sizes.items() if name.startswith(f"{names.layers}."))
    layers = len(decoder_layers(model))
    return LayerShapes(
        layers=layers,
        hidden_size=model.config.hidden_size,
        projections=matrix_shapes(model, 0),
        channels=channels_of(model, 0),
        channel_size=channel_size,
        layer_size=inside // layers,
        outside=sum(sizes.values()) - inside,
        itemsize=model.dtype.itemsize,
    )


def layer_size(shapes: LayerShapes, layer: Layer) -> int:
    """Count the numbers that a package stores of one layer."""
    if layer.kind in ("removed", "shared"):
        return 0
    if layer.harmonizer_rank is not None:
        return 2 * layer.harmonizer_rank * shapes.hidden_size + layer.harmonizer_rank + shapes.hidden_size
    size = shapes.layer_size
    for name, ranks in layer.ranks.items():
        for rank, shape in zip(ranks, shapes.projections[name], strict=True):
            size -= max(0, math.prod(shape) - rank * sum(shape)) if rank < min(shape) else 0
    if layer.channels is not None:
        size -= (shapes.channels - layer.channels) * shapes.channel_size
    return size


def plan_bytes(shapes: LayerShapes, plan: Plan) -> int:
    """Count the bytes of the tensors in a package with this plan."""
    return (shapes.outside + sum(layer_size(shapes, layer) for layer in plan)) * shapes.itemsize
