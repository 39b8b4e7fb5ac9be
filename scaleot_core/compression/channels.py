"""Prune feed-forward channels and refit the down-projection (method section 7, beyond the paper)."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.compression.low_rank import linear, weight_of
from scaleot_core.compression.svd import damped
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.settings import Channels


def pruned_share(settings: Channels, index: int, layers: int) -> float:
    """Return the share of its channels that decoder layer `index` of `layers` loses, by `ratio` and `tilt`."""
    depth = index / max(1, layers - 1)
    return settings.ratio * (1 + settings.tilt * (1 - 2 * depth))


def channels_of(model: PreTrainedModel, index: int) -> int:
    """Count the channels of one layer's feed-forward part, (in) of its down-projection."""
    down_projection = decoder_layers(model)[index].get_submodule(family(model.config).feed_forward_out)
    return weight_of(down_projection)[0].shape[1]


def channel_rows(kept: Tensor, channels: int, fused: int) -> Tensor:
    """Return the rows of the kept channels in a matrix that stacks `fused` matrices of `channels` rows each."""
    return torch.cat([kept + k * channels for k in range(fused)])


def select_channels(
    weight: Tensor, covariance: Tensor, count: int, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `count` channels that carry most of a down-projection's output, and the matrix refitted to them.

    weight: (D, f); covariance: (f, f) of the channels; returned: (count,), ascending, and (D, count). The channels are
    chosen from `among`, or all, by the largest C_cc · ‖w_c‖², as in Wanda (Sun et al., ICLR 2024) by channel; the
    refitted matrix makes up for the others by least squares, as in channel pruning (He et al., ICCV 2017).
    """
    full = weight.double()
    carried = covariance.diagonal().double() * full.square().sum(0)
    if among is not None:
        carried[torch.ones_like(carried, dtype=torch.bool).index_fill(0, among.to(carried.device), False)] = -1
    kept = carried.argsort(descending=True, stable=True)[:count].sort().values
    covariance = damped(covariance)
    refitted = torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ full.T).T
    return kept, refitted.to(weight.dtype)


@torch.no_grad()
def prune_channels(model: PreTrainedModel, index: int, kept: Tensor, refitted: Tensor | None = None) -> None:
    """Prune one layer's feed-forward part in place to the channels `kept` (count,), ascending.

    If given, `refitted` (D, count) replaces the kept columns of the down-projection. Works on the meta device too.
    """
    layer, names = decoder_layers(model)[index], family(model.config)
    for into, fused in names.feed_forward_in.items():
        weight, bias = weight_of(layer.get_submodule(into))
        rows = channel_rows(kept, len(weight) // fused, fused).to(weight.device)
        layer.set_submodule(into, linear(weight[rows], None if bias is None else bias[rows]))
    weight, bias = weight_of(layer.get_submodule(names.feed_forward_out))
    columns = weight[:, kept.to(weight.device)] if refitted is None else refitted
    layer.set_submodule(names.feed_forward_out, linear(columns, bias))


def prune_and_refit(
    model: PreTrainedModel, index: int, count: int, covariance: Tensor, among: Tensor | None = None
) -> Tensor:
    """Prune one layer in place to the `count` channels that `select_channels` takes; return them, ascending.

    covariance: (f, f) of the layer's channels. UserError where they are chosen `among` fewer.
    """
    if among is not None and count > len(among):
        raise UserError(
            f"layer {index} would keep {count} channels, of which {len(among)} have left; raise channels.ratio",
            parameter="channels.within",
        )
    weight, _ = weight_of(decoder_layers(model)[index].get_submodule(family(model.config).feed_forward_out))
    kept, refitted = select_channels(weight, covariance.to(weight.device), count, among)
    prune_channels(model, index, kept, refitted)
    return kept
