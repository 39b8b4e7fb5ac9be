"""Selective Rank Compression: the attention projections cut to a lower rank by truncated SVD (method section 4)."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.compression.low_rank import FusedProjection, LowRankLinear, linear, split_projection, weight_of
from scaleot_core.compression.svd import Decompose, Factors
from scaleot_core.models.families import (
    attention,
    decoder_layers,
    family,
    fusion,
    projection_name,
)


def round_half_up(value: float) -> int:
    """Round to the nearest whole, halves up, whatever the last bits of a share times a count are."""
    return math.floor(round(value, 9) + 0.5)


def target_rank(full: int, removed: float) -> int:
    """Return what is left of `full` without a share of it: max(1, round((1 − removed) · full)). β is such a share."""
    return max(1, round_half_up((1 - removed) * full))


def _truncated(weight: Tensor, bias: Tensor | None, rank: int, factors: Callable[[Tensor], Factors]) -> nn.Module:
    """Truncate one matrix to a rank: unchanged where nothing is cut, two factors where that is smaller, else dense."""
    if rank >= min(weight.shape):
        return linear(weight, bias)
    left, right = factors(weight.detach())
    left, right = left[:, :rank].to(weight.dtype).contiguous(), right[:rank].to(weight.dtype).contiguous()
    if rank * sum(weight.shape) < weight.numel():
        return LowRankLinear(left, right, None if bias is None else bias.detach().clone())
    return linear(left @ right, bias)


def matrix_shapes(model: PreTrainedModel, index: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the shapes (out, in) of the matrices in one layer's attention projections, by the projection's name."""
    block, shapes = attention(model.config, decoder_layers(model)[index]), {}
    for name in family(model.config).projections:
        out, into = weight_of(block.get_submodule(name))[0].shape
        heads = fusion(model.config, name).heads
        shapes[name] = tuple((out * share // sum(heads), into) for share in heads)
    return shapes


def compress_layer(
    model: PreTrainedModel, index: int, *, ranks: Mapping[str, Sequence[int]], decompose: Decompose
) -> None:
    """Cut attention projections of one decoder layer to these ranks, in place; the others are left untouched.

    Works on the meta device too, with `svd.empty_factors`. ValueError for a projection that the layer doesn't have, or
    that has another number of matrices.
    """
    block, shapes = attention(model.config, decoder_layers(model)[index]), matrix_shapes(model, index)
    for name, projection_ranks in ranks.items():
        if len(shapes.get(name, ())) != len(projection_ranks):
            raise ValueError(f"layer {index} has the projections {', '.join(shapes)}; the ranks of {name!r} fit none")
        full_name, fused = projection_name(model.config, index, name), fusion(model.config, name)
        matrices = split_projection(block.get_submodule(name), fused)
        parts = [
            _truncated(weight, bias, rank, partial(decompose, full_name, k))
            for k, (rank, (weight, bias)) in enumerate(zip(projection_ranks, matrices, strict=True))
        ]
        setattr(block, name, parts[0] if len(parts) == 1 else FusedProjection(parts, fused.runs))
