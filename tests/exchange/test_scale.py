"""The model owner's scale: the effect on the real model's logits is made as large as it was on the emulator's."""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import (
    CPU,
    LORA,
    PLAN,
    each_family,
    emulator_of,
    form,
    move_lora,
    pruned_emulator,
    refusal,
    tiny_model,
    write_adapter,
    write_package,
)

from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange import adapter
from scaleot_core.exchange import scale as scales
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.scale import check_scale, effect, emulator_effect, measure_scale
from scaleot_core.exchange.streamed_scale import measure_streamed_scale, streamed_emulator_effect
from scaleot_core.models.sources import open_model
from scaleot_core.tuning.adapters import TunedLayers, fit_to_model, plugged_in
from scaleot_core.tuning.lora import remove_lora


def layers(name):
    """Whole adapter layers that have moved."""
    torch.manual_seed(1)
    weights = layer_parameters(tiny_model(name), PLAN, "adapter")
    return TunedLayers({key: p + 0.01 * torch.randn(p.shape) for key, p in weights.items()})


@each_family
def test_effect_is_the_root_mean_square_change_of_what_the_head_gives(name, blocks):
    model, tuned = tiny_model(name), layers(name)
    with torch.no_grad():
        before = model(blocks.long()).logits
        with plugged_in(model, PLAN, tuned):
            change = model(blocks.long()).logits - before
    expected = float(change.square().mean().sqrt()) * getattr(model.config, "logits_scaling", 1.0)
    assert effect(model, plugged_in(model, PLAN, tuned), blocks) == pytest.approx(expected, rel=1e-3)
    assert effect(model, nullcontext(), blocks) == 0


@each_family
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_scale_makes_both_effects_equal(name, kind, blocks):
    if kind == "layers":
        emulator, plan, real, tuned = emulator_of(name), PLAN, tiny_model(name), layers(name)
        fitted = tuned
    else:
        emulator, plan, kept, real = pruned_emulator(name, beta=0.8)
        tuned = move_lora(emulator, plan)
        remove_lora(emulator)
        fitted = fit_to_model(tuned, real, kept)
    target = emulator_effect(emulator, plan, tuned, blocks)
    found = measure_scale(real, plan, fitted, target, blocks)
    assert found.emulator == target and found.scale in found.model
    if scales.LEAST < found.scale < scales.MOST:
        assert found.model[found.scale] == pytest.approx(target, rel=0.06)
    assert found.model[1.0] == pytest.approx(effect(real, plugged_in(real, plan, fitted), blocks))


@each_family
@pytest.mark.parametrize("lora", [None, LORA], ids=["layers", "lora"])
def test_scale_measured_a_layer_at_a_time_is_the_scale(name, lora, blocks, tmp_path, tokenizer):
    real = tiny_model(name)
    real.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    package = Package(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    tuned = adapter.read(write_adapter(tmp_path / "adapter", package.load(CPU), lora, package), package)
    target = emulator_effect(package.load(CPU), package.plan, tuned, blocks)
    expected = measure_scale(real, package.plan, tuned, target, blocks)
    with open_model(str(tmp_path / "model"), tmp_path) as source:
        found = measure_streamed_scale(source.streamed(), package, tuned, tuned, blocks)
    assert found.emulator == pytest.approx(expected.emulator, rel=1e-3) and target > 0
    assert found.scale == pytest.approx(expected.scale, rel=1e-3)
    assert list(found.model.values()) == pytest.approx(list(expected.model.values()), rel=1e-3)


def test_layer_that_is_shared_is_streamed_from_whose_weights_it_has(blocks, tmp_path, tokenizer):
    plan = Plan(("adapter", "compressed", "shared", "shared"), 0.8, form(8), like={2: 1, 3: 0})
    package = Package(write_package(tmp_path / "package", tiny_model("llama"), tokenizer, plan))
    tuned = adapter.read(write_adapter(tmp_path / "adapter", package.load(CPU), LORA, package), package)
    expected = emulator_effect(package.load(CPU), plan, tuned, blocks)
    assert streamed_emulator_effect(package, tuned, blocks, CPU) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("times", "expected"), [(1.0, 1.0), (1.6, 1.6), (0.7, 0.7), (99.0, 3.0), (0.01, 0.5), (0.0, 1.0)]
)
def test_scale_is_found_within_what_was_measured(blocks, times, expected):
    real, tuned = tiny_model("llama"), layers("llama")
    own = effect(real, plugged_in(real, PLAN, tuned), blocks)
    found = measure_scale(real, PLAN, tuned, own * times, blocks)
    assert found.scale == pytest.approx(expected, rel=0.15) and len(found.model) <= scales.STEPS


def test_adapter_that_changes_nothing_keeps_its_scale(blocks):
    real = tiny_model("llama")
    tuned = TunedLayers({key: p.clone() for key, p in layer_parameters(real, PLAN, "adapter").items()})
    assert measure_scale(real, PLAN, tuned, 1.0, blocks).scale == 1.0


def test_effect_that_is_not_finite_is_refused(blocks):
    assert "not finite" in refusal(measure_scale, tiny_model("llama"), PLAN, layers("llama"), math.nan, blocks)


@pytest.mark.parametrize("scale", [0.49, 3.01, -1.0, 0.0, math.inf, math.nan])
def test_scale_outside_of_what_was_measured_is_refused(scale):
    assert "the range is 0.5 to 3" in refusal(check_scale, scale)


def test_scale_within_it_is_taken():
    assert [check_scale(s) for s in (0.5, 1.0, 3.0)] == [0.5, 1.0, 3.0] and LORA.rank == 3
