import pytest
import torch
from helpers import CONFIGS, SHAPES, tiny_model

from scaleot_core.compression.layer_choice import ranks_left
from scaleot_core.compression.low_rank import FusedProjection, LowRankLinear
from scaleot_core.compression.rank_compression import compress_layer, target_rank
from scaleot_core.compression.shapes import layer_shapes
from scaleot_core.compression.svd import svd_factors
from scaleot_core.models.families import attention, decoder_layers


def cut(model, index, beta):
    """Compress one layer with plain decompositions; the ranks."""
    ranks = ranks_left(layer_shapes(model), beta)
    compress_layer(model, index, ranks=ranks, decompose=svd_factors)
    return ranks


def test_kept_rank():
    assert target_rank(576, 0.8) == 115
    assert target_rank(576, 0.2) == 461
    assert target_rank(10, 1.0) == 1
    assert target_rank(10, 0.0) == 10


def dense(module: torch.nn.Module, size: int) -> torch.Tensor:
    """The matrix (out, in) that a projection applies, without its bias."""
    return (module(torch.eye(size)) - module(torch.zeros(1, size))).T.detach()


def apart(family: str, projection: str, matrix: torch.Tensor) -> list[torch.Tensor]:
    """A projection's matrices, of which some families fuse three in one: GPT-NeoX and BLOOM head by head."""
    if projection == "query_key_value" and family in ("gpt_neox", "bloom"):
        return [torch.cat([matrix[24 * head + 8 * i :][:8] for head in range(4)]) for i in range(3)]
    if (
        family == "falcon" and projection == "query_key_value"
    ):  # two heads of queries, one of keys, one of values; twice
        return [torch.cat([matrix[a:b], matrix[32 + a : 32 + b]]) for a, b in ((0, 16), (16, 24), (24, 32))]
    return list(matrix.split([shape[0] for shape in SHAPES[family][projection]]))


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_every_projection_is_cut_and_its_error_is_the_tail(family, beta):
    model = tiny_model(family)
    block = attention(model.config, decoder_layers(model)[1])
    names = SHAPES[family]
    widths = {name: shapes[0][1] for name, shapes in names.items()}
    before = {name: dense(getattr(block, name), width) for name, width in widths.items()}
    zero = {name: getattr(block, name)(torch.zeros(1, width)) for name, width in widths.items()}
    ranks = cut(model, 1, beta)
    assert set(ranks) == set(names)
    for name, width in widths.items():
        after = dense(getattr(block, name), width)
        parts = (apart(family, name, matrix) for matrix in (before[name], after))
        for old, new, rank in zip(*parts, ranks[name], strict=True):
            assert rank == target_rank(min(old.shape), beta)
            tail = torch.linalg.svdvals(old)[rank:].square().sum().sqrt()
            assert (old - new).norm() == pytest.approx(tail.item(), rel=1e-4)
        torch.testing.assert_close(getattr(block, name)(torch.zeros(1, width)), zero[name])  # the bias is kept


def test_factors_where_smaller_and_dense_where_not():
    low, high = tiny_model("llama"), tiny_model("llama")
    cut(low, 0, 0.8)
    cut(high, 0, 0.1)
    assert isinstance(attention(low.config, decoder_layers(low)[0]).q_proj, LowRankLinear)
    assert isinstance(attention(high.config, decoder_layers(high)[0]).q_proj, torch.nn.Linear)
    for family, projection in (("gpt2", "c_attn"), ("gpt_neox", "query_key_value")):
        fused = tiny_model(family)
        cut(fused, 0, 0.8)
        block = attention(fused.config, decoder_layers(fused)[0])
        assert isinstance(getattr(block, projection), FusedProjection)


def test_beta_zero_touches_nothing():
    model = tiny_model("gpt2")
    layer = decoder_layers(model)[0]
    before = dict(layer.named_modules())
    cut(model, 0, 0.0)
    assert dict(layer.named_modules()) == before
