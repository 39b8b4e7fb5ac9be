"""Model families: where a causal language model keeps its decoder layers and their attention projections.

Nothing else in the library knows a family's name. Adding one is an entry in `FAMILIES` and its test.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError


@dataclass(frozen=True)
class Family:
    """Paths of attribute names, as `get_submodule` takes them."""

    layers: str
    """From the causal language model to its list of decoder layers."""
    attention: str
    """From a decoder layer to its attention."""
    projections: Mapping[str, int]
    """From the attention to each projection, and how many matrices are fused in it along its outputs."""
    feed_forward_in: tuple[str, ...]
    """From a decoder layer to each matrix that gives the feed-forward channels."""
    feed_forward_out: str
    """From a decoder layer to the matrix that takes them."""
    by_head: bool = False
    """Whether the outputs of fused matrices alternate from head to head, or each matrix's lie together."""
    transposed: bool = False
    """Whether matrices are stored as (in, out), as transformers' Conv1D has them, or as (out, in)."""


_LLAMA = Family(
    "model.layers",
    "self_attn",
    {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1},
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "attn", {"c_attn": 3, "c_proj": 1}, ("mlp.c_fc",), "mlp.c_proj", transposed=True),
    "gpt_neox": Family(  # Pythia
        "gpt_neox.layers",
        "attention",
        {"query_key_value": 3, "dense": 1},
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
        by_head=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": Family(
        "model.decoder.layers",
        "self_attn",
        {"q_proj": 1, "k_proj": 1, "v_proj": 1, "out_proj": 1},
        ("fc1",),
        "fc2",
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def family(config: PretrainedConfig) -> Family:
    """Look up the family of a model's configuration; UserError names the supported ones."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model: architecture {config.model_type!r} is not supported; supported are {known}") from None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of decoder layers itself: assigning to an entry replaces that layer in the model."""
    layers = model.get_submodule(family(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def projection_name(config: PretrainedConfig, layer: int, name: str) -> str:
    """Name one layer's attention projection as the model does."""
    return f"{family(config).layers}.{layer}.{family(config).attention}.{name}"


def feed_forward_name(config: PretrainedConfig, layer: int) -> str:
    """Name one layer's down-projection as the model does."""
    return f"{family(config).layers}.{layer}.{family(config).feed_forward_out}"


def attention(config: PretrainedConfig, layer: nn.Module) -> nn.Module:
    """Return the attention of one decoder layer."""
    return layer.get_submodule(family(config).attention)


def fused_runs(config: PretrainedConfig) -> int:
    """Count the runs in which each matrix's outputs come in a fused projection: one, or one per head."""
    return int(config.num_attention_heads) if family(config).by_head else 1
