"""Every family: its layers are the model's own, and no matrix of its attention is left out."""

import math

import pytest
import torch
import yaml
from helpers import CONFIGS, ROOT, SHAPES, projections, refusal, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.pytorch_utils import Conv1D

from scaleot_core.common.errors import UserError
from scaleot_core.compression.emulator import apply_plan, layer_parameters
from scaleot_core.compression.layer_choice import plan_for
from scaleot_core.compression.low_rank import split_projection
from scaleot_core.compression.plan import layers_of
from scaleot_core.compression.shapes import layer_shapes
from scaleot_core.compression.svd import empty_factors
from scaleot_core.models.families import FAMILIES, attention, decoder_layers, family, fusion
from scaleot_core.models.forward import StandIn
from scaleot_core.params import changed
from scaleot_core.settings import LoraForm
from scaleot_core.tuning.lora import lora_features


class Zero(StandIn):
    """A layer that forgets its input."""

    def replacement(self, hidden_states):
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
        layers[i] = Zero(in_tuple=family(model.config).in_tuple)
        logits = model(ids).logits
        assert not torch.allclose(logits, whole)
        layers[i] = layer
    assert torch.equal(model(ids).logits, whole)
    layers[3] = Zero(in_tuple=family(model.config).in_tuple)  # nothing but the final norm and the head comes after it
    logits = model(ids).logits
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_projections_are_all_matrices_of_the_attention_with_their_fused_counts(name):
    model = tiny_model(name)
    for layer in decoder_layers(model):
        found = {}
        for projection, module in attention(model.config, layer).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                matrices = split_projection(module, fusion(model.config, projection))
                found[projection] = [tuple(weight.shape) for weight, _ in matrices]
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


# Other families' models, as published.
PUBLISHED = {
    "bloom-7b1": (BloomConfig(hidden_size=4096, n_layer=30, n_head=32), 30, 7_069_016_064),
    "falcon-7b": (FalconConfig(), 32, 6_921_720_704),
    "gemma-2-2b": (Gemma2Config(), 26, 2_614_341_888),
    "gemma-3-1b": (
        Gemma3TextConfig(
            hidden_size=1152,
            intermediate_size=6912,
            num_attention_heads=4,
            num_key_value_heads=1,
            vocab_size=262144,
        ),
        26,
        999_885_952,
    ),
    "gpt-j-6b": (GPTJConfig(tie_word_embeddings=False), 28, 6_050_882_784),
    "granite-3.1-2b": (
        GraniteConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=40,
            num_key_value_heads=8,
            vocab_size=49155,
            tie_word_embeddings=True,
        ),
        40,
        2_533_531_648,
    ),
    "olmo-2-7b": (
        Olmo2Config(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=100352),
        32,
        7_298_617_344,
    ),
    "phi-3-mini": (Phi3Config(), 32, 3_821_079_552),
    "smollm3-3b": (
        SmolLM3Config(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        36,
        3_075_098_624,
    ),
    "stablelm-2-1.6b": (
        StableLmConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=100352,
            use_qkv_bias=True,
        ),
        24,
        1_644_515_328,
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_model_has_its_layers_and_a_smaller_emulator_that_lora_fits(name, params):
    config, count, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == parameters and len(decoder_layers(model)) == count
        plan = plan_for(changed(params, {"adapter_layers": 4}), range(count), layer_shapes(model))
        apply_plan(model, plan, empty_factors)
        assert 0.3 < model.num_parameters() / parameters < 0.95
        kept = layers_of(plan, "adapter", "compressed")
        numbers = [attention(config, decoder_layers(model)[i]).layer_idx for i in kept]
        assert len(set(numbers)) == len(kept) and 0 in numbers
        matrices = len(family(config).projections) + len(family(config).feed_forward_in) + 1
        assert len(lora_features(model, plan, LoraForm())) == len(kept) * matrices


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig, DeepseekV3Config])
def test_mixture_of_experts_is_refused_as_such(kind):
    assert "is a mixture of experts" in refusal(family, kind())


@pytest.mark.parametrize("name", sorted(PAPER))
def test_papers_model_has_its_layers_and_an_emulator_of_the_size_that_alpha_and_beta_say(name, params):
    config, count, parameters = PAPER[name]
    row = changed(params, yaml.safe_load((ROOT / "presets.yaml").read_text())[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == parameters and len(decoder_layers(model)) == count
        plan = plan_for(row, range(count), layer_shapes(model))
        layer, size = decoder_layers(model)[0].parameters(), config.hidden_size
        whole = sum(p.numel() for p in layer)
        apply_plan(model, plan, empty_factors)
    adapters = sum(p.numel() for p in layer_parameters(model, plan, "adapter").values())
    assert adapters == 4 * whole and 0.07 < adapters / parameters < 0.16  # about a tenth, more of a shorter stack
    harmonizers, compressed = (len(layers_of(plan, kind)) for kind in ("harmonizer", "compressed"))
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
