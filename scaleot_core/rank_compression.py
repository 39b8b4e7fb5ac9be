"""Selective Rank Compression: the attention projections cut to a lower rank by truncated SVD (method section 4)."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scaleot_core.decomposition import Decompose, Factors
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


def kept_rank(full: int, beta: float, semantics: str) -> int:
    """The rank that is left of `full` = min(rows, columns): max(1, round((1 − β) · full)), β the share removed.

    `semantics` is "removed" as above, or "kept" for β as the share that is kept. Rounding is half up.
    """
    share = 1 - beta if semantics == "removed" else beta
    return max(1, math.floor(round(share * full, 9) + 0.5))


def _matrices(module: nn.Linear | Conv1D, fused: int, runs: int) -> list[tuple[Tensor, Tensor | None]]:
    """A projection's matrices (out, in) and biases, cut apart where several are fused."""

    def cut(tensor: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (runs, fused, -1)).unbind(1)]

    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    biases = cut(module.bias) if module.bias is not None else [None] * fused
    return list(zip(cut(weight), biases, strict=True))


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


def compress_layer(
    model: PreTrainedModel, index: int, *, beta: float, semantics: str, decompose: Decompose
) -> dict[str, list[int]]:
    """Cut the attention projections of one decoder layer in place; return each one's ranks.

    Works on the meta device too, with `decomposition.shapes`. A projection of which nothing is cut is left untouched,
    so that β = 0 is the model itself.
    """
    ranks = {}
    block, runs = attention(model.config, decoder_layers(model)[index]), fused_runs(model.config)
    for name, fused in family(model.config).projections.items():
        module = block.get_submodule(name)
        assert isinstance(module, nn.Linear | Conv1D)
        matrices = _matrices(module, fused, runs)
        ranks[name] = [kept_rank(min(weight.shape), beta, semantics) for weight, _ in matrices]
        if all(rank >= min(weight.shape) for rank, (weight, _) in zip(ranks[name], matrices, strict=True)):
            continue
        factors = partial(decompose, projection_name(model.config, index, name))
        parts = [_compressed(w, b, rank, factors) for rank, (w, b) in zip(ranks[name], matrices, strict=True)]
        setattr(block, name, parts[0] if fused == 1 else FusedProjection(parts, runs))
    return ranks
