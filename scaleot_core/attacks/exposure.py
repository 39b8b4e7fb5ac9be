"""Weights given away: how much of the model's own weights is in a package, tensor by tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.families import attention, decoder_layers, family, fused_runs
from scaleot_core.plan import Plan
from scaleot_core.rank_compression import FusedProjection, LowRankLinear, matrices

Row = dict[str, Any]


@torch.no_grad()
def overlap(whole: Tensor, given: Tensor, rank: int) -> float:
    """How much of a matrix's first `rank` left singular vectors lies in the span of what was given, 0 to 1.

    The mean squared cosine of the principal angles: 1 where the leading subspace is there whole.
    """
    first = torch.linalg.svd(whole.double(), full_matrices=False)[0][:, :rank]
    there = torch.linalg.svd(given.double(), full_matrices=False)[0][:, :rank]
    return float((first.T @ there).square().sum() / rank)


def exposure(model: PreTrainedModel, emulator: PreTrainedModel, plan: Plan) -> list[Row]:
    """Of every tensor of the model: whether the package has it `exact`, at a `rank` or `none` of it, and its bytes.

    Matrices at a rank have their relative error in Frobenius norm and the `overlap` of their leading subspaces.
    """
    path, names = family(model.config).layers, family(model.config)
    there: Mapping[str, Tensor] = emulator.state_dict()
    rows: list[Row] = []
    cut: set[str] = set()
    for i in plan.layers("compressed"):
        block, left = (attention(m.config, decoder_layers(m)[i]) for m in (model, emulator))
        for name, fused in names.projections.items():
            module = left.get_submodule(name)
            if not isinstance(module, LowRankLinear | FusedProjection):
                continue  # as it is, or a dense product: told below
            parts: list[Any] = list(module.parts) if isinstance(module, FusedProjection) else [module]
            originals = matrices(block.get_submodule(name), fused, fused_runs(model.config))  # type: ignore[arg-type]
            where = f"{path}.{i}.{names.attention}.{name}.weight"
            cut.add(where)
            for k, ((whole, _), part) in enumerate(zip(originals, parts, strict=True)):
                given = part.left @ part.right if isinstance(part, LowRankLinear) else part.weight
                rank = part.left.shape[1] if isinstance(part, LowRankLinear) else min(part.weight.shape)
                error = float((whole.float() - given.float()).norm() / whole.float().norm())
                rows.append(
                    {
                        "tensor": where if fused == 1 else f"{where}[{k}]",
                        "given": "exact" if error == 0 else "rank",
                        "bytes": whole.numel() * whole.element_size(),
                        "rank": rank,
                        "error": error,
                        "overlap": overlap(whole, given, rank),
                    }
                )
    for name, tensor in model.state_dict().items():
        if name in cut or name in model.all_tied_weights_keys:
            continue
        same = there.get(name)
        exact = same is not None and same.shape == tensor.shape and torch.equal(same.to(tensor.device), tensor)
        size = tensor.numel() * tensor.element_size()
        row = {"tensor": name, "given": "exact" if exact else "none", "bytes": size}
        rows.append({**row, "rank": None, "error": None, "overlap": None})
    return rows


def shares(rows: list[Row]) -> dict[str, float]:
    """Share of the model's bytes that are given exactly, at a rank, and not at all."""
    total = sum(row["bytes"] for row in rows)
    return {kind: sum(r["bytes"] for r in rows if r["given"] == kind) / total for kind in ("exact", "rank", "none")}
