"""Weights given away: how much of the model's own weights is in a package, tensor by tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.attacks.hidden import cut_matrices
from scaleot_core.compression.channels import channels_of
from scaleot_core.compression.low_rank import weight_of
from scaleot_core.compression.plan import Plan, layers_of
from scaleot_core.models.families import family, feed_forward_paths, projection_name

Row = dict[str, Any]


@torch.no_grad()
def overlap(whole: Tensor, given: Tensor, rank: int) -> float:
    """Measure how much of a matrix's first `rank` left singular vectors lies in the span of what was given, 0 to 1.

    The mean squared cosine of the principal angles: 1 where the leading subspace is there whole.
    """
    first = torch.linalg.svd(whole.double(), full_matrices=False)[0][:, :rank]
    there = torch.linalg.svd(given.double(), full_matrices=False)[0][:, :rank]
    return float((first.T @ there).square().sum() / rank)


def _row(name: str, given: str, tensor: Tensor, share: float = 1.0) -> Row:
    size = round(tensor.numel() * tensor.element_size() * share)
    return {"tensor": name, "given": given, "bytes": size, "rank": None, "error": None, "overlap": None}


def _vectors(matrix: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in matrix.detach().float().cpu().contiguous()}


def _channel_rows(model: PreTrainedModel, emulator: PreTrainedModel, index: int) -> list[Row]:
    """List one layer's feed-forward matrices, of whose channels a share is given: as they are, or refitted."""
    names, rows = family(model.config), []
    share = channels_of(emulator, index) / channels_of(model, index)
    for inner in feed_forward_paths(model.config):
        where = f"{names.layers}.{index}.{inner}"
        (whole, bias), (given, _) = (weight_of(m.get_submodule(where)) for m in (model, emulator))
        by_channel = (given.T, whole.T) if inner == names.feed_forward_out else (given, whole)
        kept = _row(f"{where}.weight (kept channels)", "exact", whole, share)
        if not _vectors(by_channel[0]) <= _vectors(by_channel[1]):
            rank = min(given.shape)
            kept |= {"given": "rank", "rank": rank, "overlap": overlap(whole, given, rank)}
        rows += [kept, _row(f"{where}.weight (other channels)", "none", whole, 1 - share)]
        if bias is not None and inner in names.feed_forward_in:
            rows.append(_row(f"{where}.bias (kept channels)", "exact", bias, share))
            rows.append(_row(f"{where}.bias (other channels)", "none", bias, 1 - share))
    return rows


def exposure(model: PreTrainedModel, emulator: PreTrainedModel, plan: Plan) -> list[Row]:
    """List every tensor of the model: whether the package has it `exact`, at a `rank` or `none` of it, and its bytes.

    Matrices at a rank have their relative error in Frobenius norm and the `overlap` of their leading subspaces. Of a
    feed-forward matrix with fewer channels the kept share counts as exact, or, where it was refitted to them, as at the
    rank that it has; its error isn't told.
    """
    there: Mapping[str, Tensor] = emulator.state_dict()
    rows: list[Row] = []
    told: set[str] = set()
    for i in layers_of(plan, "compressed"):
        cuts = list(cut_matrices(model, emulator, plan, i))
        fused = {cut.projection for cut in cuts if cut.part}
        for cut in cuts:
            where = f"{projection_name(model.config, i, cut.projection)}.weight"
            told.add(where)
            whole, shipped = weight_of(model.get_submodule(where.removesuffix(".weight")))[0][cut.rows], cut.shipped
            row = _row(f"{where}[{cut.part}]" if cut.projection in fused else where, "rank", whole)
            error = float((whole.float() - shipped.float()).norm() / whole.float().norm())
            rows.append({**row, "rank": cut.rank, "error": error, "overlap": overlap(whole, shipped, cut.rank)})
        if plan[i].channels:
            channels = _channel_rows(model, emulator, i)
            told |= {row["tensor"].partition(" (")[0] for row in channels}
            rows += channels
    for name, tensor in model.state_dict().items():
        if name in told or name in model.all_tied_weights_keys:
            continue
        same = there.get(name)
        exact = same is not None and same.shape == tensor.shape and torch.equal(same.to(tensor.device), tensor)
        rows.append(_row(name, "exact" if exact else "none", tensor))
    return rows


def shares(rows: list[Row]) -> dict[str, float]:
    """Sum up the share of the model's bytes that are given exactly, at a rank, and not at all."""
    total = sum(row["bytes"] for row in rows)
    return {kind: sum(r["bytes"] for r in rows if r["given"] == kind) / total for kind in ("exact", "rank", "none")}
