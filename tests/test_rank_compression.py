import pytest
import torch
from conftest import CONFIGS, tiny_model

from scaleot_core.decomposition import decompose
from scaleot_core.families import attention, decoder_layers
from scaleot_core.rank_compression import FusedProjection, LowRankLinear, compress_layer, kept_rank


def cut(model, index, beta):
    """Compress one layer with plain decompositions."""
    return compress_layer(model, index, beta=beta, semantics="removed", decompose=lambda _, weight: decompose(weight))


def test_kept_rank():
    assert kept_rank(576, 0.8, "removed") == 115
    assert kept_rank(576, 0.8, "kept") == 461
    assert kept_rank(10, 1.0, "removed") == 1
    assert kept_rank(10, 0.0, "removed") == 10


def dense(module: torch.nn.Module, size: int) -> torch.Tensor:
    """The matrix (out, in) that a projection applies, without its bias."""
    return (module(torch.eye(size)) - module(torch.zeros(1, size))).T.detach()


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_every_projection_is_cut_and_its_error_is_the_tail(family, beta):
    model = tiny_model(family)
    block = attention(model.config, decoder_layers(model)[1])
    names = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "opt": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    names = names.get(family, ["c_attn", "c_proj"])
    before = {name: dense(getattr(block, name), 32) for name in names}
    zero = {name: getattr(block, name)(torch.zeros(1, 32)) for name in names}
    ranks = cut(model, 1, beta)
    assert set(ranks) == set(names)
    for name in names:
        fused = 3 if name == "c_attn" else 1
        parts = zip(before[name].chunk(fused), dense(getattr(block, name), 32).chunk(fused), ranks[name], strict=True)
        for old, new, rank in parts:
            assert rank == kept_rank(min(old.shape), beta, "removed")
            tail = torch.linalg.svdvals(old)[rank:].square().sum().sqrt()
            assert (old - new).norm() == pytest.approx(tail.item(), rel=1e-4)
        torch.testing.assert_close(getattr(block, name)(torch.zeros(1, 32)), zero[name])  # the bias is kept


def test_factors_where_smaller_and_dense_where_not():
    low, high = tiny_model("llama"), tiny_model("llama")
    cut(low, 0, 0.8)
    cut(high, 0, 0.1)
    assert isinstance(attention(low.config, decoder_layers(low)[0]).q_proj, LowRankLinear)
    assert isinstance(attention(high.config, decoder_layers(high)[0]).q_proj, torch.nn.Linear)
    fused = tiny_model("gpt2")
    cut(fused, 0, 0.8)
    assert isinstance(attention(fused.config, decoder_layers(fused)[0]).c_attn, FusedProjection)


def test_beta_zero_touches_nothing():
    model = tiny_model("gpt2")
    layer = decoder_layers(model)[0]
    before = dict(layer.named_modules())
    cut(model, 0, 0.0)
    assert dict(layer.named_modules()) == before
