"""Model families: where a causal language model keeps its decoder layers, their attention and feed-forward matrices.

Nothing else in the library knows a family's name. Adding one is an entry in `FAMILIES` and its test.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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
    feed_forward_in: Mapping[str, int]
    """From a decoder layer to each up- or gate-projection, and how many matrices are fused in it."""
    feed_forward_out: str
    """From a decoder layer to the down-projection."""
    by_head: bool = False
    """True where fused outputs alternate head by head; False where each matrix's lie together."""
    transposed: bool = False
    """True for matrices stored as (in, out), as in transformers' Conv1D; False for (out, in)."""
    in_tuple: bool = False
    """True where a decoder layer returns a tuple with the hidden states first; False where it returns them alone."""


_LLAMA = Family(
    "model.layers",
    "self_attn",
    {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1},
    {"mlp.gate_proj": 1, "mlp.up_proj": 1},
    "mlp.down_proj",
)

_BLOOM = Family(
    "transformer.h",
    "self_attention",
    {"query_key_value": 3, "dense": 1},
    {"mlp.dense_h_to_4h": 1},
    "mlp.dense_4h_to_h",
    by_head=True,
    in_tuple=True,
)

FAMILIES: dict[str, Family] = {
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": Family("transformer.h", "attn", {"c_attn": 3, "c_proj": 1}, {"mlp.c_fc": 1}, "mlp.c_proj", transposed=True),
    "gpt_neox": Family(  # Pythia
        "gpt_neox.layers",
        "attention",
        {"query_key_value": 3, "dense": 1},
        {"mlp.dense_h_to_4h": 1},
        "mlp.dense_4h_to_h",
        by_head=True,
    ),
    "gptj": Family(
        "transformer.h",
        "attn",
        {"q_proj": 1, "k_proj": 1, "v_proj": 1, "out_proj": 1},
        {"mlp.fc_in": 1},
        "mlp.fc_out",
        in_tuple=True,
    ),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _LLAMA,
    "opt": Family(
        "model.decoder.layers",
        "self_attn",
        {"q_proj": 1, "k_proj": 1, "v_proj": 1, "out_proj": 1},
        {"fc1": 1},
        "fc2",
    ),
    "phi3": Family("model.layers", "self_attn", {"qkv_proj": 3, "o_proj": 1}, {"mlp.gate_up_proj": 2}, "mlp.down_proj"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
}


def family(config: PretrainedConfig) -> Family:
    """Look up the family of a model's configuration; UserError names the supported ones."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        names = ", ".join(sorted(FAMILIES))
        what = "a mixture of experts, which no method here can cut" if _has_experts(config) else "not supported"
        raise UserError(f"model: architecture {config.model_type!r} is {what}; supported are {names}") from None


def _has_experts(config: PretrainedConfig) -> bool:
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def decoder_stack(config: PretrainedConfig) -> str:
    """Give the path to the module that holds the decoder layers and returns the last hidden states."""
    return family(config).layers.rpartition(".")[0]


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


def projection_paths(config: PretrainedConfig) -> list[str]:
    """Give the paths from a decoder layer to its attention projections."""
    return [f"{family(config).attention}.{name}" for name in family(config).projections]


def feed_forward_paths(config: PretrainedConfig) -> list[str]:
    """Give the paths from a decoder layer to its feed-forward matrices."""
    return [*family(config).feed_forward_in, family(config).feed_forward_out]


def attention(config: PretrainedConfig, layer: nn.Module) -> nn.Module:
    """Return the attention of one decoder layer."""
    return layer.get_submodule(family(config).attention)


@dataclass(frozen=True)
class Fusion:
    """How the outputs of the matrices in one projection lie: run after run, each with some heads of every matrix."""

    heads: tuple[int, ...] = (1,)
    """Of each matrix in a run; one number for a projection that is one matrix."""
    runs: int = 1

    def rows(self, out: int) -> list[Tensor]:
        """Find which of the projection's `out` outputs belong to each matrix."""
        head = out // (self.runs * sum(self.heads))
        matrices = torch.arange(out).unflatten(0, (self.runs, -1)).split([head * n for n in self.heads], dim=1)
        return [matrix.flatten() for matrix in matrices]


def _key_heads(config: PretrainedConfig) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # of Falcon
    counts = (getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"))
    return next(int(heads) for heads in counts if heads)


def fusion(config: PretrainedConfig, name: str) -> Fusion:
    """Say how an attention projection is fused: queries, keys and values are, the latter two perhaps of fewer heads."""
    if family(config).projections[name] == 1:
        return Fusion()
    heads, shared = int(config.num_attention_heads), _key_heads(config)
    runs = shared if family(config).by_head else 1
    return Fusion((heads // runs, shared // runs, shared // runs), runs)


TRAINED_LENGTH = "seq_length"
"""The setting in files of BLOOM, which its class has not: the number of tokens that it was trained on."""


def context_length(config: PretrainedConfig) -> int:
    """Give the most tokens that a model takes; of BLOOM, which takes any number, those it was trained on."""
    length: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, TRAINED_LENGTH, None)
    return length or 2048


def takes_positions(config: PretrainedConfig) -> bool:
    """Tell whether a model can be told the positions of its tokens; one with ALiBi counts them itself."""
    return config.model_type != "bloom" and not getattr(config, "alibi", False)
