"""Selective Rank Compression: the attention projections cut to a lower rank by truncated SVD (method section 4).

And, beyond the paper, the feed-forward part to fewer channels.
"""

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


def target_rank(full: int, beta: float) -> int:
    """Give the rank left of `full` = min(rows, columns): max(1, round((1 − β) · full)), β the share removed."""
    return max(1, round_half_up((1 - beta) * full))


def _truncated(weight: Tensor, bias: Tensor | None, rank: int, factors: Callable[[Tensor], Factors]) -> nn.Module:
    """Truncate one matrix to a rank: unchanged where nothing is cut, two factors where that is smaller, else dense."""
    if rank >= min(weight.shape):
        return linear(weight, bias)
    left, right = factors(weight.detach())
    left, right = left[:, :rank].to(weight.dtype).contiguous(), right[:rank].to(weight.dtype).contiguous()
    if rank * sum(weight.shape) < weight.numel():
        return LowRankLinear(left, right, None if bias is None else bias.detach().clone())
    return linear(left @ right, bias)


def matrix_shapes(model: PreTrainedModel, index: int) -> dict[str, list[tuple[int, int]]]:
    """List the shapes (out, in) of the matrices in one layer's attention projections, by the projection's name."""
    block, shapes = attention(model.config, decoder_layers(model)[index]), {}
    for name in family(model.config).projections:
        out, into = weight_of(block.get_submodule(name))[0].shape
        heads = fusion(model.config, name).heads
        shapes[name] = [(out * share // sum(heads), into) for share in heads]
    return shapes


def target_ranks(model: PreTrainedModel, index: int, *, beta: float) -> dict[str, list[int]]:
    """Give the ranks that β leaves of the matrices in one layer's attention projections, by the projection's name."""
    return {
        name: [target_rank(min(shape), beta) for shape in shapes]
        for name, shapes in matrix_shapes(model, index).items()
    }


def compress_layer(
    model: PreTrainedModel, index: int, *, ranks: Mapping[str, Sequence[int]], decompose: Decompose
) -> None:
    """Cut the attention projections of one decoder layer to some ranks, in place; ValueError for ranks of others.

    Works on the meta device too, with `svd.empty_factors`. A projection of which nothing is cut is left untouched,
    so that β = 0 is the model itself.
    """
    block = attention(model.config, decoder_layers(model)[index])
    full = {name: [min(shape) for shape in shapes] for name, shapes in matrix_shapes(model, index).items()}
    if {name: len(each) for name, each in full.items()} != {name: len(each) for name, each in ranks.items()}:
        raise ValueError(f"layer {index} has projections {', '.join(full)}, and ranks for others are given")
    for name in family(model.config).projections:
        if all(rank >= whole for rank, whole in zip(ranks[name], full[name], strict=True)):
            continue
        where, fused = projection_name(model.config, index, name), fusion(model.config, name)
        matrices = split_projection(block.get_submodule(name), fused)
        parts = [
            _truncated(weight, bias, rank, partial(decompose, where, k))
            for k, (rank, (weight, bias)) in enumerate(zip(ranks[name], matrices, strict=True))
        ]
        setattr(block, name, parts[0] if len(parts) == 1 else FusedProjection(parts, fused.runs))
