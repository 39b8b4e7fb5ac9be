"""A data owner's records, the tokenizers that read them, and what tuning sees of them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from helpers import tiny_model
from tokenizer_kinds import KINDS
from transformers import PreTrainedTokenizerBase

from scaleot_core.tuning.examples import IGNORED, Example, Examples, from_file

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
PAIR = {"prompt": "hi", "completion": " hello"}
build = cache(lambda kind: KINDS[kind]())
"""Build a tokenizer once; a test that gives it a template takes a copy."""


def turns(*contents: Any) -> list[dict[str, Any]]:
    """Make messages of the user and the assistant in turn; a system prompt comes first where it is in a tuple."""
    system = [{"role": "system", "content": contents[0][0]}] if isinstance(contents[0], tuple) else []
    words = contents[len(system) :]
    return system + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]


def read(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *rows: Any,
    context: int = 2048,
    block_size: int = 64,
    packed: bool = True,
) -> Examples:
    """Make examples of a file of records; a row that is a text is written as it is."""
    file = folder / "own.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    model = tiny_model("llama", vocab_size=max(300, len(tokenizer)), max_position_embeddings=context)
    return from_file(model, tokenizer, file, block_size=block_size, packed=packed)


def tokens_of(example: Example) -> list[int]:
    """Return all of an example's tokens, the last target included."""
    return [*example[0], example[1][-1]]


def learnt(example: Example) -> list[int]:
    """Return the targets of an example that are learnt."""
    return [target for target in example[1] if target != IGNORED]
