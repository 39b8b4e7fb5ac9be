"""The model owner's scale: the effect on the real model's logits is made as large as it was on the emulator's."""

import math

import pytest
from helpers import (
    CPU,
    LORA,
    PLAN,
    each_family,
    effect,
    form,
    pruned_emulator,
    refusal,
    tiny_model,
    write_adapter,
    write_package,
)

from scaleot_core.compression.emulator import package_tensors
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange import adapter, package
from scaleot_core.exchange import scale as scales
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.scale import check_scale, emulator_effect, find_scale, measure_scale
from scaleot_core.models.opened import open_model
from scaleot_core.tuning.adapters import fit_to_model, plugged_in, tuned_emulator


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("kind", ["layers", "lora", "lora on channels"])
def test_scale_is_that_at_which_both_models_move_as_far(name, kind, blocks, tmp_path, tokenizer):
    """Each effect is that of the whole model in memory."""
    if kind == "lora on channels":
        emulator, plan, kept, real = pruned_emulator(name, beta=0.8)
        (tmp_path / "package").mkdir()
        package.save(tmp_path / "package", real.config, tokenizer, plan, package_tensors(emulator, plan))
    else:
        plan, kept, real = PLAN, {}, tiny_model(name)
        write_package(tmp_path / "package", tiny_model(name), tokenizer)
    shipped = Package(tmp_path / "package")
    form = None if kind == "layers" else LORA
    tuned = adapter.read(write_adapter(tmp_path / "adapter", shipped.load(CPU), form, shipped), shipped)
    fitted = fit_to_model(tuned, real, kept) if form else tuned
    real.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with open_model(str(tmp_path / "model"), tmp_path) as source:
        found = measure_scale(source.streamed(), shipped, tuned, fitted, blocks)
    emulator = shipped.load(CPU)
    assert found.emulator == pytest.approx(effect(emulator, tuned_emulator(emulator, plan, tuned), blocks), rel=2e-3)
    for scale, moved in found.model.items():
        assert moved == pytest.approx(effect(real, plugged_in(real, plan, fitted, scale), blocks), rel=2e-3)
    assert found.emulator > 0 and 1.0 in found.model and found.scale in found.model
    if scales.LEAST < found.scale < scales.MOST:
        assert found.model[found.scale] == pytest.approx(found.emulator, rel=0.06)


def test_layer_that_is_shared_is_streamed_from_whose_weights_it_has(blocks, tmp_path, tokenizer):
    plan = Plan(("adapter", "compressed", "shared", "shared"), 0.8, form(8), like={2: 1, 3: 0})
    package = Package(write_package(tmp_path / "package", tiny_model("llama"), tokenizer, plan))
    tuned = adapter.read(write_adapter(tmp_path / "adapter", package.load(CPU), LORA, package), package)
    emulator = package.load(CPU)
    expected = effect(emulator, tuned_emulator(emulator, plan, tuned), blocks)
    assert emulator_effect(package, tuned, blocks, CPU) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("times", "expected"), [(1.0, 1.0), (1.6, 1.6), (0.7, 0.7), (99.0, 3.0), (0.01, 0.5), (0.0, 1.0)]
)
@pytest.mark.parametrize("power", [0.8, 1.0, 1.3])
def test_scale_is_found_within_what_was_measured(power, times, expected):
    found = find_scale(lambda scale: 4 * scale**power, 4 * times**power)
    assert found.scale == pytest.approx(expected, rel=0.06) and len(found.model) <= scales.STEPS


@pytest.mark.parametrize(("target", "expected"), [(2.0, 3.0), (1e-3, 0.5)])
def test_effect_that_hardly_grows_ends_at_the_last_scale(target, expected):
    assert find_scale(lambda scale: 1 + 1e-4 * scale, target).scale == pytest.approx(expected)


def test_adapter_that_changes_nothing_keeps_its_scale():
    assert find_scale(lambda scale: 0.0, 1.0).scale == 1.0


@pytest.mark.parametrize(("moved", "target"), [(1.0, math.nan), (math.inf, 1.0)])
def test_effect_that_is_not_finite_is_refused(moved, target):
    assert "not finite" in refusal(find_scale, lambda scale: moved, target)


@pytest.mark.parametrize("scale", [0.49, 3.01, -1.0, 0.0, math.inf, math.nan])
def test_scale_outside_of_what_was_measured_is_refused(scale):
    assert "the range is 0.5 to 3" in refusal(check_scale, scale)


def test_scale_within_it_is_taken():
    assert [check_scale(s) for s in (0.5, 1.0, 3.0)] == [0.5, 1.0, 3.0]
