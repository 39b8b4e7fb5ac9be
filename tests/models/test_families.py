"""Every family: its layers are the model's own, and no matrix of its attention is left out."""

import math

import pytest
import torch
import yaml
from helpers import CONFIGS, ROOT, SHAPES, projections, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from scaleot_core.common.errors import UserError
from scaleot_core.compression.emulator import apply_plan, layer_parameters
from scaleot_core.compression.plan import Plan, choose_layers
from scaleot_core.compression.svd import empty_factors
from scaleot_core.models.families import FAMILIES, attention, decoder_layers, family
from scaleot_core.params import changed


class Zero(nn.Module):
    """A layer that forgets its input."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states)


def test_every_family_is_tested():
    assert FAMILIES.keys() == {config.model_type for config in CONFIGS.values()}
    assert CONFIGS.keys() == SHAPES.keys()


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


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_projections_are_all_matrices_of_the_attention_with_their_fused_counts(name):
    model = tiny_model(name)
    for layer in decoder_layers(model):
        found = {}
        for projection, module in attention(model.config, layer).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                found[projection] = [
                    tuple(part.shape) for part in weight.chunk(family(model.config).projections[projection])
                ]
        assert found == SHAPES[name]


def test_projections_have_their_names_in_the_model(model):
    listed = projections(model)
    assert len(listed) == 4 * len(family(model.config).projections)
    blocks = [attention(model.config, layer) for layer in decoder_layers(model)]
    assert {id(m) for b in blocks for m in b.modules() if isinstance(m, nn.Linear | Conv1D)} == set(
        map(id, listed.values())
    )


# The paper's models as their authors published them: what isn't said is the configuration class's own default.
PAPER = {
    "gpt2-xl": (GPT2Config(n_embd=1600, n_layer=48, n_head=25), 48, 1_557_611_200),
    "opt-1.3b": (
        OPTConfig(
            hidden_size=2048,
            word_embed_proj_dim=2048,
            ffn_dim=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
        ),
        24,
        1_315_758_080,
    ),
    "opt-6.7b": (
        OPTConfig(
            hidden_size=4096,
            word_embed_proj_dim=4096,
            ffn_dim=16384,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        32,
        6_658_473_984,
    ),
    "llama-7b": (LlamaConfig(), 32, 6_738_415_616),
}


@pytest.mark.parametrize("name", sorted(PAPER))
def test_papers_model_has_its_layers_and_an_emulator_of_the_size_that_alpha_and_beta_say(name, params):
    config, count, parameters = PAPER[name]
    row = changed(
        params, {key: value for key, value in yaml.safe_load((ROOT / "presets.yaml").read_text())[name].items()}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == parameters and len(decoder_layers(model)) == count
        scores = [float(i) for i in range(count)]
        kinds = choose_layers(scores, adapter_layers=row.adapter_layers, alpha=0.25, placement="importance")
        plan = Plan(kinds, 0.8, row.harmonizer)
        layer, size = decoder_layers(model)[0].parameters(), config.hidden_size
        whole = sum(p.numel() for p in layer)
        apply_plan(model, plan, empty_factors)
    adapters = sum(p.numel() for p in layer_parameters(model, plan, "adapter").values())
    assert adapters == 4 * whole and 0.07 < adapters / parameters < 0.16  # about a tenth, more of a shorter stack
    harmonizers, compressed = (len(plan.layers(kind)) for kind in ("harmonizer", "compressed"))
    assert harmonizers == math.floor(0.25 * (count - 4) + 0.5)
    rank = row.harmonizer.rank
    harmonizer = 2 * size * rank + rank + size
    kept = max(1, math.floor(0.2 * size + 0.5))
    cut = 4 * (size * size - 2 * size * kept)  # of four square matrices, as two factors each
    expected = parameters - harmonizers * (whole - harmonizer) - compressed * cut
    assert sum(p.numel() for p in model.parameters()) == expected


def test_unsupported_architecture_names_the_supported_ones():
    with pytest.raises(UserError) as caught:
        family(BertConfig())
    assert "'bert' is not supported" in str(caught.value) and "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)
