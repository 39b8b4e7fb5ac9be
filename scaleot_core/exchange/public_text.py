"""Public text from a file, on which the model owner's scale is measured at the command line."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError
from scaleot_core.data.corpus import read_text
from scaleot_core.exchange.scale import BLOCK_SIZE, BLOCKS


def public_blocks(text: Path, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Tensor:
    """Cut the first `BLOCKS` blocks (N, T) from a text; UserError for one that can't be read or is too short."""
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
