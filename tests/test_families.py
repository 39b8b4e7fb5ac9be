"""Every family: its layers are the model's own, and no matrix of its attention is left out."""

import pytest
import torch
from conftest import CONFIGS, tiny_model
from torch import nn
from transformers import BertConfig
from transformers.pytorch_utils import Conv1D

from scaleot_core.errors import UserError
from scaleot_core.families import FAMILIES, attention, decoder_layers, family, projections

SQUARE = (32, 32)
SHAPES = {  # of every attention matrix (out, in), fused ones apart
    "llama": {"q_proj": [SQUARE], "k_proj": [(16, 32)], "v_proj": [(16, 32)], "o_proj": [SQUARE]},
    "opt": {"q_proj": [SQUARE], "k_proj": [SQUARE], "v_proj": [SQUARE], "out_proj": [SQUARE]},
    "gpt2": {"c_attn": [SQUARE] * 3, "c_proj": [SQUARE]},
}


class Zero(nn.Module):
    """A layer that forgets its input."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states)


def test_every_family_is_tested():
    assert FAMILIES.keys() == CONFIGS.keys() == SHAPES.keys()


def test_assigning_to_an_entry_replaces_the_layer_in_the_models_forward(model, blocks):
    ids = blocks[:2].long()
    whole = model(ids).logits
    layers = decoder_layers(model)
    assert len(layers) == 4
    for i, layer in enumerate(layers):
        layers[i] = Zero()
        logits = model(ids).logits
        assert not torch.allclose(logits, whole)
        layers[i] = layer
    assert torch.equal(model(ids).logits, whole)
    layers[3] = Zero()  # nothing but the final norm and the head comes after it
    logits = model(ids).logits
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_projections_are_all_matrices_of_the_attention_with_their_fused_counts(name):
    model = tiny_model(name)
    for layer in decoder_layers(model):
        found = {}
        for projection, module in attention(model.config, layer).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                found[projection] = [tuple(part.shape) for part in weight.chunk(FAMILIES[name].projections[projection])]
        assert found == SHAPES[name]


def test_projections_are_listed_by_their_names_in_the_model(model):
    listed = projections(model)
    assert len(listed) == 4 * len(family(model.config).projections)
    assert all(model.get_submodule(path) is module for path, module in listed.items())
    blocks = [attention(model.config, layer) for layer in decoder_layers(model)]
    assert {id(m) for b in blocks for m in b.modules() if isinstance(m, nn.Linear | Conv1D)} == set(
        map(id, listed.values())
    )


def test_unsupported_architecture_names_the_supported_ones():
    with pytest.raises(UserError) as caught:
        family(BertConfig())
    assert "'bert' is not supported" in str(caught.value) and "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)
