"""Selective Rank Compression: the attention projections cut to a lower rank by truncated SVD (method section 4).

And, beyond the paper, the feed-forward part to fewer channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scaleot_core.decomposition import Decompose, Factors, damped
from scaleot_core.families import attention, decoder_layers, family, fused_runs, projection_name


class LowRankLinear(nn.Module):
    """y = left · (right · x) + bias, with left (out, r) and right (r, in): a linear map of rank r as two factors."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)


class FusedProjection(nn.Module):
    """Projections of one input side by side, as GPT-2's c_attn gives q, k and v: (..., in) to (..., sum of outs).

    With `runs` above one their outputs alternate: the first run of each, then the second of each, as in GPT-NeoX.
    """

    def __init__(self, parts: list[nn.Module], runs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x).unflatten(-1, (self.runs, -1)) for part in self.parts], dim=-2).flatten(-3)


def dense(module: LowRankLinear) -> nn.Linear:
    """The same map as one matrix."""
    return _linear(module.left @ module.right, module.bias)


def kept_rank(full: int, beta: float, semantics: str) -> int:
    """The rank that is left of `full` = min(rows, columns): max(1, round((1 − β) · full)), β the share removed.

    `semantics` is "removed" as above, or "kept" for β as the share that is kept. Rounding is half up.
    """
    share = 1 - beta if semantics == "removed" else beta
    return max(1, math.floor(round(share * full, 9) + 0.5))


def part_rows(out: int, fused: int, runs: int) -> list[Tensor]:
    """Which of a fused projection's outputs are each matrix's."""
    return [part.flatten() for part in torch.arange(out).unflatten(0, (runs, fused, -1)).unbind(1)]


def matrices(module: nn.Linear | Conv1D, fused: int, runs: int) -> list[tuple[Tensor, Tensor | None]]:
    """A projection's matrices (out, in) and biases, cut apart where several are fused."""
    weight, bias = weight_of(module)
    if fused == 1:
        return [(weight, bias)]
    rows = [part.to(weight.device) for part in part_rows(len(weight), fused, runs)]
    return [(weight[part], None if bias is None else bias[part]) for part in rows]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(False)


def _compressed(weight: Tensor, bias: Tensor | None, rank: int, factors: Callable[[Tensor], Factors]) -> nn.Module:
    """One matrix at a rank: as it is where nothing is cut, two factors where that is smaller, else dense."""
    if rank >= min(weight.shape):
        return _linear(weight, bias)
    left, right = factors(weight.detach())
    left, right = left[:, :rank].to(weight.dtype).contiguous(), right[:rank].to(weight.dtype).contiguous()
    if rank * sum(weight.shape) < weight.numel():
        return LowRankLinear(left, right, None if bias is None else bias.detach().clone())
    return _linear(left @ right, bias)


def matrix_shapes(model: PreTrainedModel, index: int) -> dict[str, list[tuple[int, int]]]:
    """Shapes (out, in) of the matrices in one layer's attention projections, by the projection's name."""
    block, shapes = attention(model.config, decoder_layers(model)[index]), {}
    for name, fused in family(model.config).projections.items():
        out, into = weight_of(block.get_submodule(name))[0].shape
        shapes[name] = [(out // fused, into)] * fused
    return shapes


def kept_ranks(model: PreTrainedModel, index: int, *, beta: float, semantics: str) -> dict[str, list[int]]:
    """The ranks that β leaves of the matrices in one layer's attention projections, by the projection's name."""
    return {
        name: [kept_rank(min(shape), beta, semantics) for shape in shapes]
        for name, shapes in matrix_shapes(model, index).items()
    }


def compress_layer(
    model: PreTrainedModel, index: int, *, ranks: Mapping[str, Sequence[int]], decompose: Decompose
) -> None:
    """Cut the attention projections of one decoder layer to some ranks, in place; ValueError for ranks of others.

    Works on the meta device too, with `decomposition.shapes`. A projection of which nothing is cut is left untouched,
    so that β = 0 is the model itself.
    """
    block, runs = attention(model.config, decoder_layers(model)[index]), fused_runs(model.config)
    full = {name: [min(shape) for shape in shapes] for name, shapes in matrix_shapes(model, index).items()}
    if {name: len(each) for name, each in full.items()} != {name: len(each) for name, each in ranks.items()}:
        raise ValueError(f"layer {index} has projections {', '.join(full)}, and ranks for others are given")
    for name, fused in family(model.config).projections.items():
        if all(rank >= whole for rank, whole in zip(ranks[name], full[name], strict=True)):
            continue
        module = block.get_submodule(name)
        assert isinstance(module, nn.Linear | Conv1D)
        where = projection_name(model.config, index, name)
        parts = [
            _compressed(weight, bias, rank, partial(decompose, where, k))
            for k, (rank, (weight, bias)) in enumerate(zip(ranks[name], matrices(module, fused, runs), strict=True))
        ]
        setattr(block, name, parts[0] if fused == 1 else FusedProjection(parts, runs))


def channels_of(model: PreTrainedModel, index: int) -> int:
    """How many channels one layer's feed-forward part has."""
    return len(weight_of(decoder_layers(model)[index].get_submodule(family(model.config).feed_forward_in[0]))[0])


def fewer_channels(weight: Tensor, covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` channels that carry most of what a matrix (D, f) gives out, ascending, and what takes its place.

    Of channels with the covariance C (f, f) those of the largest C_cc · ‖w_c‖², as in Wanda (Sun et al., ICLR 2024),
    by channel; the matrix (D, count) makes up for the others by least squares, as in channel pruning (He et al., ICCV
    2017).
    """
    whole = weight.double()
    carried = covariance.diagonal().double() * whole.square().sum(0)
    kept = carried.argsort(descending=True, stable=True)[:count].sort().values
    covariance = damped(covariance)
    refitted = torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ whole.T).T
    return kept, refitted.to(weight.dtype)


@torch.no_grad()
def keep_channels(model: PreTrainedModel, index: int, kept: Tensor, refitted: Tensor | None = None) -> None:
    """Leave some channels of one layer's feed-forward part, in place; `kept` are their numbers, ascending.

    `refitted` (D, number of them) takes the place of what the matrix that takes the channels has for them. Works on the
    meta device too.
    """
    layer, names = decoder_layers(model)[index], family(model.config)
    for into in names.feed_forward_in:
        weight, bias = weight_of(layer.get_submodule(into))
        at = kept.to(weight.device)
        layer.set_submodule(into, _linear(weight[at], None if bias is None else bias[at]))
    weight, bias = weight_of(layer.get_submodule(names.feed_forward_out))
    left = weight[:, kept.to(weight.device)] if refitted is None else refitted
    layer.set_submodule(names.feed_forward_out, _linear(left, bias))


def weight_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A matrix (out, in) and its bias."""
    assert isinstance(module, nn.Linear | Conv1D)
    return module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias
