"""Linear maps as two factors or fused side by side, and a projection cut into its matrices."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scaleot_core.models.families import Fusion


class LowRankLinear(nn.Module):
    """y = left · (right · x) + bias, with left (out, r) and right (r, in): a linear map of rank r as two factors."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.left = nn.Parameter(left, requires_grad=False)
        self.right = nn.Parameter(right, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = right.shape[1], left.shape[0]

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
        sizes = [features(part) for part in parts]
        self.in_features, self.out_features = sizes[0][0], sum(out for _, out in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., sum of outs)."""
        return torch.cat([part(x).unflatten(-1, (self.runs, -1)) for part in self.parts], dim=-1).flatten(-2)


def features(module: nn.Module) -> tuple[int, int]:
    """Give the numbers of inputs and outputs of a linear map, whatever holds it."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear | LowRankLinear | FusedProjection)
    return module.in_features, module.out_features


def dense(module: LowRankLinear) -> nn.Linear:
    """Multiply the two factors out into one matrix."""
    return linear(module.left @ module.right, module.bias)


def split_projection(module: nn.Module, fused: Fusion) -> list[tuple[Tensor, Tensor | None]]:
    """Cut a projection into its matrices (out, in) and biases, where several are fused."""
    weight, bias = weight_of(module)
    if len(fused.heads) == 1:
        return [(weight, bias)]
    rows = [matrix.to(weight.device) for matrix in fused.rows(len(weight))]
    return [(weight[matrix], None if bias is None else bias[matrix]) for matrix in rows]


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a frozen linear map of a copy of a matrix (out, in) and a bias."""
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(False)


def weight_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a projection's matrix (out, in) and bias, whatever its type."""
    assert isinstance(module, nn.Linear | Conv1D)
    return module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias
