"""The restoration attack wins where there is something to win, and goes on where it was stopped."""

import math
from functools import partial

import pytest
import torch
from helpers import IDS, PLAN, dies_after, each_shape, emulator_of, logits, plan_of, plan_of_kinds, tiny_model

from scaleot_core.attacks import restoration
from scaleot_core.attacks.hidden import cut_parameters
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.compression.low_rank import LowRankLinear
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.models.forward import mean_loss
from scaleot_core.training.checkpoint import Checkpoint


@pytest.fixture
def budget(params):
    return params.attack.model_copy(update={"steps": 40, "batch_blocks": 4, "lr": 3e-3, "eval_points": 2})


@each_shape
def test_widened_emulator_starts_as_the_emulator_and_has_whole_layers(name):
    plain, wide = emulator_of(name), emulator_of(name)
    restoration.widen(wide, PLAN)
    if name != "opt-350m":  # its norms come behind
        torch.testing.assert_close(logits(wide), logits(plain), rtol=1e-4, atol=1e-5)
    whole = sum(p.numel() for p in decoder_layers(tiny_model(name))[0].parameters())
    assert sum(p.numel() for p in decoder_layers(wide)[0].parameters()) > whole
    assert not [m for m in wide.modules() if isinstance(m, LowRankLinear)]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(wide.generate(IDS, **options, use_cache=use) for use in (True, False)))


def test_emulator_that_lacks_layers_can_be_widened_too():
    plan = plan_of(tiny_model("llama"), plan_of_kinds(("harmonizer", "adapter", "removed", "compressed")))
    plain, wide = emulator_of("llama", plan), emulator_of("llama", plan)
    restoration.widen(wide, plan)
    torch.testing.assert_close(logits(wide), logits(plain), rtol=1e-4, atol=1e-5)


@each_shape
def test_forgetting_leaves_adapters_embeddings_and_head(name):
    known, forgotten = emulator_of(name), emulator_of(name)
    restoration.forget(forgotten, PLAN, seed=0)
    adapters, path = layer_parameters(known, PLAN, "adapter"), family(known.config).layers
    for key, parameter in known.named_parameters():
        same = torch.equal(parameter, forgotten.get_parameter(key))
        assert same == (key in adapters or not key.startswith(path) or (parameter.ndim == 1 and same)), key


def attacked(model, blocks, budget, tmp_path, seed=0, name="a", seconds=1e9):
    checkpoint = Checkpoint(tmp_path / name, seconds)
    return restoration.restore(model, blocks, blocks, budget, seed=seed, label="attack", checkpoint=checkpoint)


def test_attack_wins_back_what_the_corpus_teaches(blocks, budget, tmp_path):
    curve = attacked(emulator_of("llama"), blocks, budget, tmp_path)
    assert [point["tokens"] for point in curve] == [0, 20 * 4 * 16, 40 * 4 * 16]
    assert curve[0]["loss"] == pytest.approx(mean_loss(emulator_of("llama"), blocks))
    assert curve[2]["loss"] < curve[1]["loss"] < curve[0]["loss"]


def test_attack_trains_every_weight(blocks, budget, tmp_path):
    model, before = emulator_of("llama"), dict(emulator_of("llama").named_parameters())
    attacked(model, blocks, budget, tmp_path)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_attacker_of_what_was_cut_leaves_the_rest_as_it_was(blocks, budget, tmp_path):
    model, before = emulator_of("llama"), dict(emulator_of("llama").named_parameters())
    trained = cut_parameters(tiny_model("llama"), model, plan_of(tiny_model("llama")))
    checkpoint = Checkpoint(tmp_path / "a", 1e9)
    options = {"seed": 0, "label": "attack", "checkpoint": checkpoint, "parameters": trained}
    curve = restoration.restore(model, blocks, blocks, budget, **options)
    assert curve[-1]["loss"] < curve[0]["loss"]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained.keys() and 0 < len(moved) < len(before)


def test_imitation_is_cross_entropy_to_what_the_served_model_says(blocks):
    model, served = emulator_of("llama").requires_grad_(True), tiny_model("llama")
    told, said = (m(input_ids=blocks[:2].long()).logits[:, :-1].softmax(-1) for m in (served, model))
    expected = -(told * said.log()).sum(-1).mean()
    loss = restoration.imitation_loss(model, served, blocks[:2])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    own = tiny_model("llama").requires_grad_(True)
    least = restoration.imitation_loss(own, served, blocks[:2])  # the entropy, and no way down from it
    least.backward()
    assert least < loss and all(p.grad is None or p.grad.abs().max() < 1e-6 for p in own.parameters())
    draw = torch.distributions.Categorical(told).sample((2000,))  # sampled labels have it for their mean
    sampled = torch.stack([-said.gather(-1, each[..., None]).log().mean() for each in draw]).mean()
    assert sampled.item() == pytest.approx(loss.item(), rel=1e-2)


@pytest.mark.slow
def test_attacker_by_queries_comes_nearer_to_the_served_model(blocks, budget, tmp_path):
    model, served = emulator_of("llama"), tiny_model("llama")
    before = restoration.imitation_loss(model, served, blocks).item()
    options = {"seed": 0, "label": "attack", "checkpoint": Checkpoint(tmp_path / "a", 1e9)}
    restoration.restore(
        model, blocks, blocks, budget, **options, loss=partial(restoration.imitation_loss, model, served)
    )
    assert restoration.imitation_loss(model, served, blocks).item() < before


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 15, 20, 30])
def test_interrupted_attack_goes_on_to_the_same_figures(blocks, budget, tmp_path, killed_at):
    whole = attacked(emulator_of("llama"), blocks, budget, tmp_path, name="whole")
    with dies_after(restoration, "next_token_loss", killed_at), pytest.raises(KeyboardInterrupt):
        attacked(emulator_of("llama"), blocks, budget, tmp_path, name="again", seconds=0.0)
    model, done = emulator_of("llama"), emulator_of("llama")
    assert attacked(model, blocks, budget, tmp_path, name="again") == whole
    assert attacked(done, blocks, budget, tmp_path, name="again") == whole  # and what is over is there again
    assert all(torch.equal(p, done.get_parameter(name)) for name, p in model.named_parameters())


def test_shares_of_the_way_back_are_in_log_perplexity():
    found = {
        "package": [{"tokens": 0, "loss": 4.0}, {"tokens": 9, "loss": 3.5}],
        "other": [{"tokens": 0, "loss": 5.0}, {"tokens": 9, "loss": 3.0}],
    }
    rows = restoration.curves(found, 3.0)
    assert [(row["target"], row["tokens"], row["recovered"]) for row in rows] == [
        ("package", 0, 0.0),
        ("package", 9, 0.5),
        ("other", 0, -1.0),
        ("other", 9, 1.0),
    ]
    assert rows[1]["perplexity"] == pytest.approx(math.exp(3.5))
    assert [row["recovered"] for row in restoration.curves(found, 4.0)] == [None] * 4  # nothing was cut
