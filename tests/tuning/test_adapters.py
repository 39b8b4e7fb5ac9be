"""Whole adapter layers in the real model: what they change, and that others than its own are refused."""

import pytest
import torch
from helpers import PLAN, each_shape, emulator_of, refusal, tiny_model, weights_hash

from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.tuning.adapters import TunedLayers, plug_in


@each_shape
def test_plug_in_puts_the_adapters_into_the_real_model_and_touches_nothing_else(name):
    emulator, real = emulator_of(name), tiny_model(name)
    tuned = {key: p + 1 for key, p in layer_parameters(emulator, PLAN, "adapter").items()}
    before = {key: p.clone() for key, p in real.named_parameters()}
    plug_in(real, PLAN, TunedLayers(tuned))
    for key, parameter in real.named_parameters():
        assert torch.equal(parameter, tuned.get(key, before[key]))
    assert all(not torch.equal(before[key], tensor) for key, tensor in tuned.items())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(64, 32)),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(64, 32)),
        ("model.norm.weight", torch.ones(32)),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(63, 32)),
        ("model.layers.1.mlp.up_proj.weight", None),
    ],
    ids=["name", "another layer", "outside the layers", "shape", "missing"],
)
def test_adapters_that_do_not_fit_are_refused_and_none_is_put_in(name, tensor):
    real = tiny_model("llama")
    before = weights_hash(real)
    tuned = {key: p + 1 for key, p in layer_parameters(emulator_of("llama"), PLAN, "adapter").items()}
    given = {key: value for key, value in {**tuned, name: tensor}.items() if value is not None}
    assert repr(name) in refusal(plug_in, real, PLAN, TunedLayers(given))
    assert weights_hash(real) == before
