import pytest
import torch
from conftest import CONFIGS, tiny_model

from scaleot_core.families import attention, decoder_layers
from scaleot_core.rank_compression import FusedProjection, LowRankLinear, compress_layer, kept_rank, truncate


@pytest.mark.parametrize("shape", [(32, 32), (16, 32), (32, 16)])
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_error_is_the_tail_of_the_singular_values(shape, rank):
    weight = torch.randn(shape)
    left, right = truncate(weight, rank)
    tail = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    assert (weight.double() - left.double() @ right.double()).norm() == pytest.approx(tail.item(), rel=1e-4)
    assert torch.linalg.matrix_rank(left @ right) == rank


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
    layer = decoder_layers(model)[1]
    block = attention(model.config, layer)
    names = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "opt": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    names = names.get(family, ["c_attn", "c_proj"])
    before = {name: dense(getattr(block, name), 32) for name in names}
    zero = {name: getattr(block, name)(torch.zeros(1, 32)) for name in names}
    ranks = compress_layer(model.config, layer, beta=beta, semantics="removed")
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
    compress_layer(low.config, decoder_layers(low)[0], beta=0.8, semantics="removed")
    compress_layer(high.config, decoder_layers(high)[0], beta=0.1, semantics="removed")
    assert isinstance(attention(low.config, decoder_layers(low)[0]).q_proj, LowRankLinear)
    assert isinstance(attention(high.config, decoder_layers(high)[0]).q_proj, torch.nn.Linear)
    fused = tiny_model("gpt2")
    compress_layer(fused.config, decoder_layers(fused)[0], beta=0.8, semantics="removed")
    assert isinstance(attention(fused.config, decoder_layers(fused)[0]).c_attn, FusedProjection)


def test_beta_zero_touches_nothing():
    model = tiny_model("gpt2")
    layer = decoder_layers(model)[0]
    before = dict(layer.named_modules())
    compress_layer(model.config, layer, beta=0.0, semantics="removed")
    assert dict(layer.named_modules()) == before
