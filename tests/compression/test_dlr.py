"""Dynamic LayerReplace against its equations, written naively."""

import math

import pytest
import torch
from helpers import silence, weights_hash

from scaleot_core.common.errors import UserError
from scaleot_core.common.random import generator
from scaleot_core.compression.dlr import (
    distinct_candidates,
    sample_kept,
    train,
    updated_scores,
)
from scaleot_core.compression.layer_importance import new_harmonizers
from scaleot_core.models.families import family
from scaleot_core.models.forward import next_token_loss


@pytest.mark.parametrize("layers, replaced", [(4, [2]), (8, [2, 2]), (30, [2] * 7 + [1]), (7, [2, 1])])
def test_half_of_every_group_is_replaced(layers, replaced):
    for i in range(20):
        kept = sample_kept(torch.randn(layers), 4, 1.0, generator(0, i))
        assert [int((~group).sum()) for group in kept.split(4)] == replaced


def test_draws_differ_and_follow_the_scores():
    scores = torch.tensor([4.0, -4.0, -4.0, -4.0])
    draws = [tuple(sample_kept(scores, 4, 1.0, generator(0, i)).tolist()) for i in range(200)]
    assert len(set(draws)) > 1
    assert sum(d[0] for d in draws) > 190 and 60 < sum(d[1] for d in draws) < 140


def test_settled_layers_leave_the_draw_as_far_as_their_group_allows():
    scores = torch.tensor([3.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 0.0])
    draws = torch.stack([sample_kept(scores, 4, 0.9, generator(0, i)) for i in range(200)])
    assert draws[:, 0].all() and not draws[:, 7].any()  # of three settled in a group of four, one is replaced in turn
    assert all(60 < count < 140 for count in draws[:, 1:4].sum(0) * 1.5)
    assert all(100 < count < 170 for count in draws[:, 4:7].sum(0))
    loose = torch.stack([sample_kept(scores, 4, 1.0, generator(0, i)) for i in range(200)])
    assert not loose[:, 0].all() and loose[:, 7].any()


def test_candidates_are_distinct():
    found = distinct_candidates(torch.zeros(4), 4, 1.0, 6, generator(0))
    assert len({tuple(c.tolist()) for c in found}) == 6
    settled = torch.tensor([9.0, 9.0, 0.0, 0.0])
    assert len(distinct_candidates(settled, 4, 0.9, 3, generator(0))) == 1  # nothing else is left to draw


def test_score_update_equals_the_listing_and_credits_only_kept_layers():
    scores = torch.tensor([0.3, -0.2, 0.0, 1.5, -1.0], dtype=torch.float64)
    candidates = [torch.tensor(c, dtype=torch.bool) for c in ([1, 0, 1, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 1, 0])]
    losses = [3.1, 2.7, 4.0]
    expected = scores.tolist()
    mean = sum(math.exp(-loss) for loss in losses) / 3
    for kept, loss in zip(candidates, losses, strict=True):
        reward = math.exp(-loss) - mean
        for i in range(5):
            p = 1 / (1 + math.exp(-scores[i].item()))
            if kept[i]:
                expected[i] += 10 * reward * p * (1 - p)
    updated = updated_scores(scores, candidates, torch.tensor(losses, dtype=torch.float64), 10)
    torch.testing.assert_close(updated, torch.tensor(expected, dtype=torch.float64))
    assert updated[1] == scores[1] and updated[4] == scores[4]  # never kept


def test_training_moves_only_harmonizers_that_took_part(model, blocks, params):
    harmonizers = new_harmonizers(model.config, 8, seed=0)
    before = {name: p.clone() for name, p in harmonizers.named_parameters()}
    whole = weights_hash(model)
    settings = params.dlr.model_copy(update={"steps": 1, "score_blocks": 2})
    train(model, harmonizers, torch.zeros(4), blocks, settings, seed=0)
    kept = sample_kept(torch.zeros(4).double(), settings.group_size, settings.keep_threshold, generator(0, "dlr", 0))
    for i in range(4):
        moved = not torch.equal(before[f"{i}.up.weight"], harmonizers[i].up.weight)
        assert moved == (not kept[i])
    assert weights_hash(model) == whole


def learn(model, blocks, without: int) -> None:
    """Teach a tiny model some blocks, with one layer an identity throughout, so that losing any other layer hurts."""
    silence(model, without)
    prefix = f"{family(model.config).layers}.{without}."
    taught = [p.requires_grad_() for name, p in model.named_parameters() if not name.startswith(prefix)]
    optimizer = torch.optim.Adam(taught, lr=6e-3)
    for _ in range(75):
        next_token_loss(model, blocks).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


# The scores' rule knows no family; these have their layers in different ways (fused, in a tuple, parallel, norms).
@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["bloom", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"], indirect=True
)
def test_an_identity_layer_ends_with_the_lowest_score(model, blocks, params):
    learn(model, blocks, without=2)
    harmonizers = new_harmonizers(model.config, 8, seed=0)
    settings = params.dlr.model_copy(
        update={"steps": 50, "lr": 1e-4, "score_interval": 1, "score_lr": 20.0, "score_blocks": 12, "batch_blocks": 12}
    )
    scores, history = train(model, harmonizers, torch.zeros(4), blocks.repeat(2, 1), settings, seed=0)
    assert scores.argmin() == 2, scores
    assert len(history) == 50 and {"score_00", "candidate_best", "candidate_worst"} <= history[-1].keys()


def test_more_candidates_than_networks_are_refused(model, blocks, params):
    settings = params.dlr.model_copy(update={"candidates": 7})
    with pytest.raises(UserError, match=r"dlr\.candidates = 7.* 6 networks"):
        train(model, new_harmonizers(model.config, 8, seed=0), torch.zeros(4), blocks, settings, seed=0)


def test_groups_larger_than_the_model_are_refused(model, blocks, params):
    settings = params.dlr.model_copy(update={"group_size": 5})
    with pytest.raises(UserError, match=r"dlr\.group_size = 5"):
        train(model, new_harmonizers(model.config, 8, seed=0), torch.zeros(4), blocks, settings, seed=0)
