import pytest
import torch

from scaleot_core.compression.channels import pruned_share, select_channels
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
