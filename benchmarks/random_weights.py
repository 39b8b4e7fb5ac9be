"""Models of random weights in bfloat16, for figures of memory and speed alone."""

import math
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from scaleot_core.common.tensors import Shapes, TensorWriter
from scaleot_core.models.loading import empty_model


@cache
def _numbers(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.bfloat16).normal_(0, 0.02)


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Give a tensor's random numbers, the same for all of a shape, so that a package's are the model's; norms' ones."""
    return torch.ones(shape, dtype=torch.bfloat16) if "norm" in name else _numbers(math.prod(shape)).view(shape)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<eos>"])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def write_model(folder: Path, config: PretrainedConfig) -> Shapes:
    """Write a transformers folder with random weights, norms of ones, and a `byte_tokenizer`; give the shapes."""
    config.dtype = torch.bfloat16
    model = empty_model(config, torch.bfloat16, buffers_too=False)
    tied = model.all_tied_weights_keys
    shapes = {n: (tuple(tensor.shape), tensor.dtype) for n, tensor in model.state_dict().items() if n not in tied}
    folder.mkdir(parents=True, exist_ok=True)
    writer = TensorWriter(folder / "model.safetensors", shapes)
    for name, (shape, _) in shapes.items():
        writer.write(name, drawn(name, shape))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return shapes
