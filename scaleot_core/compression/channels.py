"""Prune feed-forward channels and refit the down-projection (method section 7, beyond the paper)."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.compression.low_rank import linear, weight_of
from scaleot_core.compression.svd import damped
from scaleot_core.models.families import decoder_layers, family


def channels_of(model: PreTrainedModel, index: int) -> int:
    """Count the channels of one layer's feed-forward part."""
    taking = decoder_layers(model)[index].get_submodule(family(model.config).feed_forward_out)
    return weight_of(taking)[0].shape[1]


def channel_rows(kept: Tensor, channels: int, fused: int) -> Tensor:
    """Give the rows of the kept channels in a matrix that stacks `fused` matrices of `channels` rows each."""
    return torch.cat([kept + k * channels for k in range(fused)])


def select_channels(weight: Tensor, covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Select the `count` channels that carry most of a down-projection's output, and refit it (D, f) to them.

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
def prune_channels(model: PreTrainedModel, index: int, kept: Tensor, refitted: Tensor | None = None) -> None:
    """Prune one layer's feed-forward part in place to the channels `kept`, numbers in ascending order.

    `refitted` (D, number of them) takes the place of what the matrix that takes the channels has for them. Works on the
    meta device too.
    """
    layer, names = decoder_layers(model)[index], family(model.config)
    for into, fused in names.feed_forward_in.items():
        weight, bias = weight_of(layer.get_submodule(into))
        at = channel_rows(kept, len(weight) // fused, fused).to(weight.device)
        layer.set_submodule(into, linear(weight[at], None if bias is None else bias[at]))
    weight, bias = weight_of(layer.get_submodule(names.feed_forward_out))
    left = weight[:, kept.to(weight.device)] if refitted is None else refitted
    layer.set_submodule(names.feed_forward_out, linear(left, bias))
