"""The probe of a package: nothing is said of an honest one of any family, and what is planted is named."""

import pytest
import torch
from helpers import PLAN, each_family, emulator_of, silence

from scaleot_core.exchange.suspicions import SENTENCES, suspicions
from scaleot_core.models.families import decoder_layers, feed_forward_paths


@pytest.fixture
def sentences(tokenizer):
    return tokenizer(list(SENTENCES))["input_ids"]


@each_family
def test_honest_emulator_raises_no_alarm_and_planted_zeros_do(name, sentences):
    model = emulator_of(name)
    assert not suspicions(model, PLAN, sentences, 7)
    last = decoder_layers(model)[3].get_submodule(feed_forward_paths(model.config)[-1])
    with torch.no_grad():
        last.weight[3] = 0
    lines = suspicions(model, PLAN, sentences, 7)
    assert len(lines) == 1 and lines[0].startswith("layer 3: ") and lines[0].endswith("has 1 rows or columns of zeros")


def test_probe_leaves_a_model_in_16_bits_as_it_was(sentences):
    model = emulator_of("llama").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not suspicions(model, PLAN, sentences, 7)
    assert all(t.dtype == before[name].dtype and torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_layer_that_changes_nothing_is_named(sentences):
    model = emulator_of("llama")
    silence(model, 1)
    assert "layer 1: it changes nothing" in suspicions(model, PLAN, sentences, 7)
