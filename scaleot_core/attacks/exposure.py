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


def _row(name: str, given: str, tensor: Tensor, share: float = 1.0, **rank: float) -> dict[str, Any]:
    """Return a row of the table: `rank` has the rank and the relative error of a matrix at a lower rank."""
    size = round(tensor.numel() * tensor.element_size() * share)
    return {"tensor": name, "given": given, "bytes": size, "rank": None, "error": None, **rank}


def _vectors(matrix: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in matrix.detach().float().cpu().contiguous()}


def _channel_rows(model: PreTrainedModel, emulator: PreTrainedModel, index: int) -> list[dict[str, Any]]:
    """List one layer's feed-forward matrices, of whose channels a share is given: as they are, or refitted."""
    names, rows = family(model.config), []
    share = channels_of(emulator, index) / channels_of(model, index)
    for inner in feed_forward_paths(model.config):
        path = f"{names.layers}.{index}.{inner}"
        (weight, bias), (shipped, _) = (weight_of(m.get_submodule(path)) for m in (model, emulator))
        by_channel = (shipped.T, weight.T) if inner == names.feed_forward_out else (shipped, weight)
        exact = _vectors(by_channel[0]) <= _vectors(by_channel[1])
        rank = {} if exact else {"rank": min(shipped.shape)}
        rows.append(_row(f"{path}.weight (kept channels)", "exact" if exact else "rank", weight, share, **rank))
        rows.append(_row(f"{path}.weight (other channels)", "none", weight, 1 - share))
        if bias is not None and inner in names.feed_forward_in:
            rows.append(_row(f"{path}.bias (kept channels)", "exact", bias, share))
            rows.append(_row(f"{path}.bias (other channels)", "none", bias, 1 - share))
    return rows


@torch.no_grad()
def exposure(model: PreTrainedModel, emulator: PreTrainedModel, plan: Plan) -> list[dict[str, Any]]:
    """List every tensor of the model: whether the package has it `exact`, at a `rank` or `none` of it, and its bytes.

    Matrices at a rank have their relative error in Frobenius norm. Of a feed-forward matrix with fewer channels the
    share kept counts as exact, or, where it was refitted, as at the rank that it has, without an error.
    """
    shipped_tensors: Mapping[str, Tensor] = emulator.state_dict()
    rows: list[dict[str, Any]] = []
    for i in layers_of(plan, "compressed"):
        cuts = list(cut_matrices(model, emulator, plan, i))
        fused = {cut.projection for cut in cuts if cut.part}
        for cut in cuts:
            path = projection_name(model.config, i, cut.projection)
            weight = weight_of(model.get_submodule(path))[0][cut.rows]
            error = float((weight.float() - cut.shipped.float()).norm() / weight.float().norm())
            name = f"{path}.weight" + f" (part {cut.part})" * (cut.projection in fused)
            rows.append(_row(name, "rank", weight, rank=cut.rank, error=error))
        if plan[i].channels:
            rows += _channel_rows(model, emulator, i)
    listed = {row["tensor"].partition(" (")[0] for row in rows}
    for name, tensor in model.state_dict().items():
        if name in listed or name in model.all_tied_weights_keys:
            continue
        shipped = shipped_tensors.get(name)
        exact = shipped is not None and shipped.shape == tensor.shape and torch.equal(shipped.to(tensor.device), tensor)
        rows.append(_row(name, "exact" if exact else "none", tensor))
    return rows


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sum up the share of the model's bytes that are given exactly, at a rank, and not at all."""
    total = sum(row["bytes"] for row in rows)
    return {
        kind: sum(row["bytes"] for row in rows if row["given"] == kind) / total for kind in ("exact", "rank", "none")
    }
