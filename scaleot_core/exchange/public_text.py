"""Public text from a file, on which the model owner's scale is measured at the command line."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError
from scaleot_core.data.corpus import read_text
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.scale import BLOCK_SIZE, BLOCKS, MeasuredScale, emulator_effect, measure_scale
from scaleot_core.models.families import context_length
from scaleot_core.models.loading import one_dtype
from scaleot_core.tuning.adapters import TunedAdapter


def measure_on_text(
    text: Path,
    package: Package,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TunedAdapter,
    fitted: TunedAdapter,
) -> MeasuredScale:
    """Run `measure_scale` on a file of public text; `fitted` is the adapter at the real model's shapes.

    UserError for a package that isn't sound, and for text that can't be read or is too short.
    """
    blocks = _blocks(text, tokenizer, context_length(model.config))
    target = emulator_effect(package.load(model.device), package.plan, adapter, blocks)
    with one_dtype(model):
        return measure_scale(model, package.plan, fitted, target, blocks)


def _blocks(text: Path, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Tensor:
    """Cut the first `BLOCKS` blocks (N, T) from a text."""
    if not text.is_file():
        raise UserError(f"{text}: no such file; name a .txt or .jsonl file of public text")
    size, tokens = min(BLOCK_SIZE, context_length), list[int]()
    for passage in read_text(str(text)):
        if len(tokens) >= BLOCKS * size:
            break
        tokens += tokenizer(passage, add_special_tokens=False)["input_ids"]
    if len(tokens) < size:
        raise UserError(f"{text}: it has {len(tokens)} tokens, at least {size} are needed; give more text")
    count = min(BLOCKS, len(tokens) // size)
    return torch.tensor(tokens[: count * size]).view(count, size)
