"""DP-SGD: every gradient clipped alone, the noise that the accountant asks for, and nothing that leaks beside."""

import math
import sys
import time

import pytest
import torch
from helpers import PLAN, dies_after, emulator_of, piqa_rows, refusal, tiny_model, weights_hash

from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.tuning import privacy, tuner
from scaleot_core.tuning.examples import collate, from_task
from scaleot_core.tuning.private_optimizer import PrivateOptimizer
from scaleot_core.tuning.selection import tune
from scaleot_core.tuning.tuner import answer_loss, train_privately

CLIP = 0.005  # below the norms of these models' gradients


@pytest.fixture
def data(tokenizer):
    return from_task(tiny_model("llama"), tokenizer, "piqa", piqa_rows(20), block_size=16)


@pytest.fixture
def settings(params):
    changes = {"epochs": 2, "batch_size": 4, "max_steps": 0, "epsilon": 4.0, "delta": 0.01, "clip": CLIP}
    return params.offsite_tune.model_copy(update=changes)


def optimizer(parameters, noise=0.0, batch_size=4):
    return PrivateOptimizer(parameters, weight_decay=0.0, clip=CLIP, noise=noise, batch_size=batch_size)


def sums(private_adamw, monkeypatch):
    """What AdamW is given at the next step."""
    gradients, masters = {}, private_adamw.masters
    monkeypatch.setattr(
        private_adamw.adamw, "step", lambda: gradients.update({n: masters[n].grad.clone() for n in masters})
    )
    private_adamw.step_with_noise(1e-3, privacy.secret_draw(0, "noise"))
    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sum_is_that_of_every_examples_own_clipped_gradient(name, dtype, data, monkeypatch):
    model = emulator_of(name).to(dtype)
    parameters = layer_parameters(model, PLAN, "adapter")
    for p in parameters.values():
        p.requires_grad_(True)
    private_adamw = optimizer(parameters)
    expected = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in parameters.items()}
    for example in data[:3]:
        gradients = torch.autograd.grad(answer_loss(model, *collate([example])), list(parameters.values()))
        norm = math.sqrt(sum(float(g.float().square().sum()) for g in gradients))
        assert norm > CLIP
        for key, gradient in zip(parameters, gradients, strict=True):
            expected[key] += gradient.float() * CLIP / norm / 4
        answer_loss(model, *collate([example])).backward()
        private_adamw.add()
    for key, gradient in sums(private_adamw, monkeypatch).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "opt-350m"])
def test_why_gradients_are_not_taken_by_opacus_hooks(name, data):
    """They are right but where the decoder flattens the batch, as OPT's does; once they are there too, use them."""
    from opacus.grad_sample import GradSampleModule

    model = emulator_of(name)
    parameters = layer_parameters(model, PLAN, "adapter")
    for p in parameters.values():
        p.requires_grad_(True)
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    for module in model.modules():  # hooks look at what trains; dropout stays off
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    inputs = torch.randint(1, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    answer_loss(model, inputs, inputs).mul(3).backward()  # equal lengths: the sum of the examples' mean losses
    hooked_gradients = {p: p.grad_sample for p in parameters.values()}
    hooked.disable_hooks()
    off = 0.0
    for i in range(3):
        part = inputs[i : i + 1]
        samples = torch.autograd.grad(answer_loss(model, part, part), list(parameters.values()))
        for p, sample in zip(parameters.values(), samples, strict=True):
            off = max(off, float((hooked_gradients[p][i] - sample).norm() / sample.norm()))
    assert off > 0.5 if name.startswith("opt") else off < 1e-5, off


def test_small_gradients_are_not_stretched(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(3))
    private_adamw = optimizer({"p": p})
    p.grad = torch.tensor([CLIP / 10, 0.0, 0.0])
    private_adamw.add()
    assert sums(private_adamw, monkeypatch)["p"].tolist() == pytest.approx([CLIP / 40, 0, 0])


def test_step_without_an_example_is_noise_of_the_right_size(monkeypatch):
    private_adamw = optimizer({"p": torch.nn.Parameter(torch.zeros(100_000))}, noise=3.0)
    noise = sums(private_adamw, monkeypatch)["p"]
    assert float(noise.std()) == pytest.approx(3.0 * CLIP / 4, rel=0.02) and abs(float(noise.mean())) < 0.001


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_record_whose_gradient_is_not_finite_counts_as_nothing(monkeypatch, value):
    p = torch.nn.Parameter(torch.zeros(3))
    private_adamw = optimizer({"p": p})
    for gradient in (torch.tensor([value, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])):
        p.grad = gradient
        private_adamw.add()
    assert sums(private_adamw, monkeypatch)["p"].tolist() == pytest.approx([CLIP / 4, 0, 0], rel=1e-3)


@pytest.mark.slow
def test_record_whose_loss_is_not_finite_doesnt_end_the_run(data, settings, monkeypatch):
    measure = tuner.answer_loss
    monkeypatch.setattr(tuner, "answer_loss", lambda m, i, t: measure(m, i, t) * (math.nan if i.shape[1] % 2 else 1.0))
    history, _, _ = private(data, settings)
    assert all(math.isfinite(row["loss"]) for row in history)


def test_every_bit_of_the_seed_counts():
    draws = {tuple(privacy.secret_draw(5 + 2**bit, "noise", 0).random(3)) for bit in (0, 32, 40, 63, 200)}
    assert len(draws) == 5


def test_nothing_is_left_over_for_the_next_step(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(3))
    private_adamw = optimizer({"p": p})
    p.grad = torch.ones(3)
    private_adamw.add()
    assert sums(private_adamw, monkeypatch)["p"].any() and not sums(private_adamw, monkeypatch)["p"].any()


def private(data, settings, seed=0, only="", **changes):
    model = tiny_model("llama")
    parameters = {name: p for name, p in model.named_parameters() if only in name}
    tuned = train_privately(model, parameters, data, settings.model_copy(update=changes), seed=seed, label="test")
    return *tuned, weights_hash(model)


@pytest.mark.slow
def test_epsilon_is_kept_to_and_tells_its_steps(data, settings):
    history, epsilon, _ = private(data, settings)
    assert len(history) == 10 and settings.epsilon - 0.02 < epsilon <= settings.epsilon
    noise = [privacy.noise_multiplier(settings, sample_rate=0.2, steps=steps) for steps in (10, 40, 160)]
    assert noise[0] < noise[1] < noise[2]
    assert privacy.spent(settings, noise=noise[0], sample_rate=0.2, steps=10) == pytest.approx(epsilon, abs=0.02)
    less = settings.model_copy(update={"epsilon": 1.0})
    assert privacy.noise_multiplier(less, sample_rate=0.2, steps=10) > noise[0]


@pytest.mark.parametrize("epsilon", [50.0, 1e6, 1e12])
def test_large_epsilon_is_answered_within_seconds_and_kept_to(settings, epsilon):
    large, start = settings.model_copy(update={"epsilon": epsilon}), time.monotonic()
    noise = privacy.noise_multiplier(large, sample_rate=1 / 3, steps=3)
    spent = privacy.spent(large, noise=noise, sample_rate=1 / 3, steps=3)
    assert 0.99 * epsilon <= spent <= epsilon and time.monotonic() - start < 30


@pytest.mark.slow
def test_every_example_has_a_coin_of_its_own(data, settings):
    history, _, _ = private(data, settings, epochs=40, only="model.norm")  # noise on all weights takes far longer
    counts = [row["examples"] for row in history]
    assert sum(counts) / len(counts) == pytest.approx(4, rel=0.15) and len(set(counts)) > 4


@pytest.mark.slow
def test_seed_decides_every_byte(data, settings):
    (first, _, one), (again, _, two), (other, _, three) = (private(data, settings, seed=seed) for seed in (0, 0, 1))
    assert first == again and one == two and first != other and one != three


@pytest.mark.slow
def test_killed_private_tuning_goes_on_to_the_same_bytes(data, settings, tmp_path):
    def tuned(folder, model):
        parameters = dict(model.named_parameters())
        return tune(model, parameters, data, settings, seed=0, label="test", checkpoint=Checkpoint(folder, 0))

    whole, again = tiny_model("llama"), tiny_model("llama")
    expected = tuned(tmp_path / "whole", whole)
    with dies_after(tuner, "answer_loss", 15), pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "killed", tiny_model("llama"))
    assert tuned(tmp_path / "killed", again) == expected and expected.epsilon is not None
    assert weights_hash(again) == weights_hash(whole)


def test_what_would_break_the_promise_is_refused(data, settings):
    assert "above one over the 20 examples" in refusal(lambda: private(data, settings, delta=0.06))
    assert "no noise keeps to it" in refusal(lambda: private(data, settings, epsilon=1e-4, delta=1e-5))


def test_missing_opacus_is_one_line(data, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants.utils", None)
    assert "pip install" in refusal(lambda: private(data, settings))
