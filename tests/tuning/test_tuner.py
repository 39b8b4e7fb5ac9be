"""Training sees every question once an epoch, and moves what it is given alone."""

import math

import pytest
import torch
from helpers import PLAN, emulator_of, refusal, tiny_model, weights_hash

from scaleot_core.common.random import generator
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.tuning import tuner
from scaleot_core.tuning.examples import collate
from scaleot_core.tuning.tuner import epoch_batches, train


def run(settings, data, seed=0, model=None, lr=1e-3):
    """Tune all of a tiny model; the history and the model."""
    model = model or tiny_model("llama")
    return train(model, dict(model.named_parameters()), data, settings, lr=lr, seed=seed, label="test"), model


@pytest.mark.parametrize(("count", "size"), [(9, 4), (100, 3), (5, 8), (1, 1)])
def test_an_epoch_has_every_question_once(count, size):
    lengths = [i * 37 % 50 for i in range(count)]
    first, again, other = (epoch_batches(lengths, size, generator(0, n)) for n in ("a", "a", "b"))
    assert sorted(i for batch in first for i in batch) == list(range(count))
    assert len(first) == math.ceil(count / size) and max(map(len, first)) <= size
    assert first == again and (first != other or len(first) == 1)


def test_batches_hold_questions_of_similar_length():
    lengths = [i * 37 % 101 for i in range(160)]
    batches = epoch_batches(lengths, 10, generator(0))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) < 20
    assert sorted(batches, key=lambda batch: lengths[batch[0]]) != batches  # and come in any order


def test_every_epoch_sees_every_question_once(settings, data, monkeypatch):
    seen = []
    monkeypatch.setattr(tuner, "collate", lambda batch: seen.extend(batch) or collate(batch))
    drawn, draw = [], tuner.epoch_batches
    monkeypatch.setattr(tuner, "epoch_batches", lambda *args: drawn.append(1) or draw(*args))
    history, _ = run(settings, data)
    assert (len(history), len(seen), len(drawn)) == (9, 27, 3)  # three epochs of three batches, each drawn once
    epochs = [seen[start : start + 9] for start in (0, 9, 18)]
    assert all(sorted(epoch) == sorted(data) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("limit", "steps"), [(1, 1), (4, 4), (100, 9), (0, 9)])
def test_step_limit_stops_training(settings, data, limit, steps):
    model, forwards = tiny_model("llama"), []
    model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    history, _ = run(settings.model_copy(update={"max_steps": limit}), data, model=model)
    assert [row["step"] for row in history] == list(range(steps)) and len(forwards) == steps


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon"])
def test_only_the_given_parameters_change(name, settings, data):
    model = emulator_of(name)
    parameters = layer_parameters(model, PLAN, "adapter")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train(model, parameters, data, settings, lr=1e-3, seed=0, label="test")
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(before[key], tensor)}
    assert changed <= parameters.keys()
    assert changed >= {key for key, p in parameters.items() if p.ndim == 2}
    assert not any(p.requires_grad for p in model.parameters())


def test_loss_goes_down(settings, data):
    history, _ = run(settings.model_copy(update={"epochs": 20}), data, lr=1e-2)
    losses = [row["loss"] for row in history]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_loss_that_is_no_number_ends_the_run(settings, data):
    model = tiny_model("llama")
    model.model.norm.weight.fill_(math.nan)
    assert "loss is nan at step 0" in refusal(lambda: run(settings, data, model=model))


def test_seed_decides_every_byte(settings, data):
    (first, one), (again, two), (other, three) = (run(settings, data, seed=seed) for seed in (0, 0, 1))
    assert first == again and weights_hash(one) == weights_hash(two)
    assert first != other and weights_hash(one) != weights_hash(three)
