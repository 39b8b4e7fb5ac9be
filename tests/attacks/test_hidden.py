"""What the package hides: what stands for it is what `cut_only` trains, and drawn anew it costs what it is worth."""

import pytest
import torch
from helpers import IDS, WHOLE, each_shape, emulator_of, logits, plan_of, plan_of_kinds, pruned_emulator, tiny_model

from scaleot_core.attacks import hidden
from scaleot_core.attacks.hidden import cut_parameters, draw_hidden, recovery_difficulty
from scaleot_core.models.families import family
from scaleot_core.models.forward import mean_loss


@each_shape
def test_only_what_stands_for_what_was_cut_is_trained(name):
    real, emulator = tiny_model(name), emulator_of(name)
    trained = cut_parameters(real, emulator, plan_of(real))
    path, inside = family(real.config).layers, family(real.config).attention
    same = {
        key for key, tensor in real.state_dict().items() if torch.equal(tensor, emulator.state_dict().get(key, IDS))
    }
    assert trained and not trained.keys() & same
    assert all(f"{path}.0.{n}" in trained for n in dict(emulator.get_submodule(f"{path}.0").named_parameters()))
    cut = {key for key in trained if not key.startswith(f"{path}.0.")}
    assert cut and all(key.startswith((f"{path}.2.{inside}.", f"{path}.3.{inside}.")) for key in cut)
    assert not [key for key in cut if trained[key].ndim < 2]  # biases are as they were


@each_shape
def test_pruned_feed_forward_matrices_are_among_them(name):
    found = pruned_emulator(name)
    trained = cut_parameters(found.real, found.emulator, found.plan)
    names = family(found.real.config)
    inner = (*names.feed_forward_in, names.feed_forward_out)
    assert trained.keys() == {f"{names.layers}.{i}.{matrix}.weight" for i in found.kept for matrix in inner}


def test_nothing_stands_for_what_was_removed_or_not_cut():
    plan = plan_of_kinds(("removed", "adapter", "compressed", "compressed"))
    for cut in (plan, WHOLE):
        assert not cut_parameters(tiny_model("llama"), emulator_of("llama", cut), cut)


@each_shape
def test_what_is_hidden_is_drawn_anew_and_the_rest_stays(name):
    real, drawn, emulator = tiny_model(name), tiny_model(name), emulator_of(name)
    draw_hidden(drawn, emulator, plan_of(real), {}, seed=0)
    names = family(real.config)
    for key, weight in real.named_parameters():
        index, _, inner = key.removeprefix(f"{names.layers}.").partition(".")
        layer = int(index) if key.startswith(names.layers) else None
        projection = any(inner == f"{names.attention}.{p}.weight" for p in names.projections)
        anew = layer == 0 or (layer in (2, 3) and projection)
        if weight.ndim > 1 or not anew:
            assert torch.equal(weight, drawn.get_parameter(key)) != anew, key


@each_shape
def test_what_the_package_has_of_a_cut_matrix_stays(name):
    real, emulator = tiny_model(name), emulator_of(name)
    plan = plan_of(real)
    draw_hidden(real, emulator, plan, {}, seed=0)
    for cut in hidden.cut_matrices(real, emulator, plan, 2):
        where = f"{family(real.config).attention}.{cut.projection}"
        layer = real.get_submodule(f"{family(real.config).layers}.2")
        weight = layer.get_submodule(where).weight
        matrix = (weight.T if family(real.config).transposed else weight)[cut.rows]
        left, values, right = torch.linalg.svd(cut.shipped)
        left, right = left[:, : cut.rank], right[: cut.rank]
        torch.testing.assert_close(left.T @ matrix @ right.T, values[: cut.rank].diag(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(left.T @ matrix, left.T @ cut.shipped, rtol=1e-3, atol=1e-4)
        assert torch.linalg.matrix_rank(matrix) > cut.rank


@each_shape
def test_only_the_channels_that_are_not_there_are_drawn(name):
    found, before = pruned_emulator(name), tiny_model(name)
    draw_hidden(found.real, found.emulator, found.plan, found.kept, seed=0)
    names = family(before.config)
    for i, kept in found.kept.items():
        where = f"{names.layers}.{i}.{names.feed_forward_out}.weight"
        old, new = before.get_parameter(where), found.real.get_parameter(where)
        old, new = (old.T, new.T) if names.transposed else (old, new)
        same = (old == new).all(0).nonzero().flatten()
        assert torch.equal(same, kept)
        for inner in names.feed_forward_in:
            changed = before.get_parameter(f"{names.layers}.{i}.{inner}.weight") != found.real.get_parameter(
                f"{names.layers}.{i}.{inner}.weight"
            )
            assert 0 < changed.float().mean() <= 1 - len(kept) / old.shape[1]


def test_difficulty_is_the_mean_loss_over_draws_and_none_where_nothing_is_hidden():
    blocks = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))
    model, emulator = tiny_model("llama"), emulator_of("llama")
    plan = plan_of(model)
    found = recovery_difficulty(model, emulator, plan, {}, blocks, seed=0)
    losses = []
    for seed in range(hidden.DRAWS):
        again = tiny_model("llama")
        draw_hidden(again, emulator, plan, {}, seed)
        losses.append(mean_loss(again, blocks))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses)) and found["loss_stdev"] > 0
    none = recovery_difficulty(tiny_model("llama"), emulator_of("llama", WHOLE), WHOLE, {}, blocks, seed=0)
    assert none == {"loss": pytest.approx(mean_loss(tiny_model("llama"), blocks)), "loss_stdev": 0.0}
    assert torch.equal(logits(model), logits(again))  # left as it was drawn last
