from itertools import pairwise

import pytest
import torch
from helpers import refusal, tiny_model

from scaleot_core.compression.channels import prune_and_refit, pruned_share, select_channels
from scaleot_core.settings import Channels


@pytest.mark.parametrize(("tilt", "shares"), [(0.0, [0.4] * 5), (-0.5, [0.2, 0.3, 0.4, 0.5, 0.6])])
def test_shares_rise_or_fall_evenly_over_the_stack(tilt, shares):
    settings = Channels(ratio=0.4, tilt=tilt)
    assert [pruned_share(settings, i, 5) for i in range(5)] == pytest.approx(shares)
    assert pruned_share(settings, 0, 1) == pytest.approx(0.4 * (1 + tilt))


def test_channels_that_are_left_make_up_for_the_others():
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=draw) * torch.logspace(0, -2, 24)[:, None]
    hidden = torch.randn(4096, 24, generator=draw) @ mixing  # (tokens, channels), correlated
    hidden[:, 5] *= 1e-4  # idle, and large in the matrix
    weight = torch.randn(10, 24, generator=draw)
    weight[:, 5] *= 100
    kept, refitted = select_channels(weight, hidden.T @ hidden / len(hidden), 16)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 16 and 5 not in kept
    best = torch.linalg.lstsq(hidden[:, kept].double(), (hidden @ weight.T).double()).solution.T
    error, least, without = (
        (hidden @ weight.T - hidden[:, kept] @ w.float().T).norm() for w in (refitted, best, weight[:, kept])
    )
    assert least <= error < 1.01 * least and error < 0.5 * without
    everything, same = select_channels(weight, hidden.T @ hidden / len(hidden), 24)
    assert everything.tolist() == list(range(24))
    torch.testing.assert_close(same, weight, rtol=1e-4, atol=1e-4)


@pytest.fixture
def drawn():
    """A down-projection and a covariance of its 24 channels."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 24, generator=draw) * torch.rand(24, generator=draw)
    return torch.randn(10, 24, generator=draw), hidden.T @ hidden / 500


def test_channels_of_a_larger_ratio_are_among_those_of_a_smaller_one(drawn):
    """So the packages of one preset line have no more together than the largest."""
    sets = [set(select_channels(*drawn, count)[0].tolist()) for count in range(1, 25)]
    assert all(small < large for small, large in pairwise(sets))


def test_channels_are_chosen_from_those_that_may_be(drawn):
    weight, covariance = drawn
    among = torch.tensor([0, 3, 4, 9, 17, 22])
    kept, refitted = select_channels(weight, covariance, 4, among)
    carried = covariance.diagonal() * weight.square().sum(0)
    assert kept.tolist() == sorted(among[carried[among].topk(4).indices].tolist()) and refitted.shape == (10, 4)
    said = refusal(prune_and_refit, tiny_model("llama"), 2, 7, torch.eye(64), among)
    assert said.startswith("channels.within: layer 2 would keep 7 channels, of which 6 have left")
