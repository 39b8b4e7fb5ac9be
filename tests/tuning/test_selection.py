"""Held-out examples decide the learning rate, and when to stop."""

import pytest
import torch
from helpers import dies_after, refusal, tiny_model, weights_hash

from scaleot_core.common.random import generator
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import Diverged
from scaleot_core.tuning import selection, tuner
from scaleot_core.tuning.examples import Examples
from scaleot_core.tuning.selection import tune
from scaleot_core.tuning.tuner import mean_answer_loss, train


def run(settings, data, seed=0, model=None, lr=1e-3):
    """Tune all of a tiny model; the history and the model."""
    model = model or tiny_model("llama")
    return train(model, dict(model.named_parameters()), data, settings, lr=lr, seed=seed, label="test"), model


def decide(data, settings, folder, model=None, **changes):
    """Tune all of a tiny model with what the data decides."""
    model = model or tiny_model("llama")
    how = {"seed": 0, "label": "test", "checkpoint": Checkpoint(folder, 0)}
    return tune(model, dict(model.named_parameters()), data, settings.model_copy(update=changes), **how)


def test_single_rate_is_taken_as_it_is(data, settings, tmp_path):
    model = tiny_model("llama")
    tuned = decide(data, settings, tmp_path, model, lr=[1e-3])
    history, by_hand = run(settings, data, lr=1e-3)
    assert (tuned.lr, tuned.steps, tuned.validation_loss, tuned.tuned_on, tuned.held_out) == (1e-3, 9, {}, 9, 0)
    assert tuned.history == history and weights_hash(model) == weights_hash(by_hand)


@pytest.mark.slow
def test_best_rate_is_that_of_lowest_loss_on_held_out_questions(data, settings, tmp_path, monkeypatch):
    seen, scored = [], []
    trained, loss = selection.train, selection.mean_answer_loss
    monkeypatch.setattr(selection, "train", lambda *args, **options: seen.append(args[2]) or trained(*args, **options))
    monkeypatch.setattr(selection, "mean_answer_loss", lambda *args: scored.append(args[1]) or loss(*args))
    model, rates = tiny_model("llama"), [1e-6, 1e-2, 1e-3]
    tuned = decide(data, settings, tmp_path, model, lr=rates, validation_fraction=0.3)
    assert len(scored) == 3 and all(len(part) == 3 for part in scored)
    for part, held in zip(seen[:3], scored, strict=True):
        assert sorted(part + held) == sorted(data)
    losses = tuned.validation_loss
    assert losses.keys() == {"1e-06", "0.01", "0.001"} and str(tuned.lr) == min(losses, key=losses.__getitem__)
    for lr in (1e-6, 1e-2):  # by hand
        _, by_hand = run(settings, seen[0], lr=lr)
        assert losses[str(lr)] == pytest.approx(loss(by_hand, scored[0], 100), rel=1e-5)
    assert seen[3] == data  # in the end on all, from the start
    assert weights_hash(model) == weights_hash(run(settings, data, lr=tuned.lr)[1])


@pytest.mark.slow
def test_finished_rates_are_not_tried_again(data, settings, tmp_path, monkeypatch):
    first = decide(data, settings, tmp_path, lr=[1e-3, 1e-4])
    trained, ran = selection.train, []
    monkeypatch.setattr(selection, "train", lambda *args, **options: ran.append(1) or trained(*args, **options))
    assert decide(data, settings, tmp_path, lr=[1e-3, 1e-4]) == first and len(ran) == 1


@pytest.mark.slow
def test_rate_that_diverges_is_not_chosen(data, settings, tmp_path, monkeypatch):
    trained = selection.train

    def train_or_diverge(*args, lr, **options):
        if lr > 0.1:
            raise Diverged("the loss is nan")
        return trained(*args, lr=lr, **options)

    monkeypatch.setattr(selection, "train", train_or_diverge)
    tuned = decide(data, settings, tmp_path / "some", lr=[0.5, 1e-3])
    assert tuned.lr == 1e-3 and tuned.validation_loss["0.5"] is None
    assert "not finite with any learning rate" in refusal(lambda: decide(data, settings, tmp_path / "all", lr=[0.5, 1]))


def test_too_few_questions_to_hold_some_out(data, settings, tmp_path):
    for examples, share in ((Examples(data[:1]), 0.1), (data, 1.0)):
        changes = {"patience": 1, "validation_fraction": share}
        assert "too few to hold some out" in refusal(lambda e=examples, c=changes: decide(e, settings, tmp_path, **c))


@pytest.mark.slow
def test_where_none_is_held_out_all_is_trained_on_for_all_epochs(data, settings, tmp_path):
    model = tiny_model("llama")
    tuned = decide(data, settings, tmp_path, model, lr=[1e-3], patience=1, validation_fraction=0.0)
    history, by_hand = run(settings, data, lr=1e-3)
    assert tuned.history == history and weights_hash(model) == weights_hash(by_hand)


def test_examples_of_one_record_are_held_out_together(data, settings, tmp_path, monkeypatch):
    scored, loss = [], selection.mean_answer_loss
    monkeypatch.setattr(selection, "mean_answer_loss", lambda *args: scored.append(args[1]) or loss(*args))
    origins = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    examples = Examples(data, origins=origins)
    result = decide(examples, settings, tmp_path, epochs=1, patience=1, validation_fraction=0.3)
    (held,) = scored
    assert (result.tuned_on, result.held_out) == (2, 1)
    assert [origins[data.index(example)] for example in held] in ([0] * 3, [1] * 3, [2] * 3)


@pytest.fixture
def impatient(settings):
    """What learns its few questions by heart, so that others get worse."""
    changes = {"lr": [3e-2], "epochs": 30, "patience": 2, "validation_fraction": 0.3, "warmup_ratio": 0.0}
    return settings.model_copy(update=changes)


@pytest.mark.slow
def test_training_stops_when_the_held_out_loss_gets_no_better_and_keeps_the_best(data, impatient, tmp_path):
    model = tiny_model("llama")
    tuned = decide(data, impatient, tmp_path, model)
    losses = list(tuned.validation_loss.values())
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30 and next(iter(tuned.validation_loss)) == "epoch 1"
    assert len(tuned.history) == 2 * len(losses) and tuned.steps == 2 * (best + 1)
    order = torch.randperm(9, generator=generator(0, "validation")).tolist()
    assert mean_answer_loss(model, [data[i] for i in order[:3]], 4) == pytest.approx(min(losses), rel=1e-6)


class Killed(BaseException):
    """As if the process were gone."""


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_impatient_training_that_is_killed_goes_on_to_the_same_bytes(data, impatient, tmp_path, step):
    whole, again = tiny_model("llama"), tiny_model("llama")
    expected = decide(data, impatient, tmp_path / "whole", whole)
    calls = step + step // 2  # the held-out questions are a batch an epoch
    with dies_after(tuner, "answer_loss", calls, Killed), pytest.raises(Killed):
        decide(data, impatient, tmp_path / "killed", tiny_model("llama"))
    assert decide(data, impatient, tmp_path / "killed", again) == expected
    assert weights_hash(again) == weights_hash(whole)
