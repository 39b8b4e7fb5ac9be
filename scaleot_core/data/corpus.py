"""Public text packed into blocks of tokens, some of them held out for perplexity."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.random import generator
from scaleot_core.data.local_files import READ, ROWS, TEXTS, has_suffix
from scaleot_core.data.rows import read_rows, read_text_file

SHUFFLED = 10_000  # passages that are held to draw the next one from: a stream is never read whole


def read_text(source: str, revision: str = "") -> Iterator[str]:
    """Yield the passages of a file, of all such files in a folder, or of a hub data set, streamed.

    A file has rows with the field `text`, as the Pile's shards have (.jsonl, .json, .parquet), or is plain text, parted
    by blank lines (.txt); either may be compressed. `revision` is a commit, tag or branch on the hub, empty for the
    newest. UserError for a file or data set that can't be read, and for a row without text.
    """
    files = local_files(source)
    if files is None:
        rows = enumerate(_stream(source, revision), start=1)
        yield from _texts((f"{source}, row {number}", row) for number, row in rows)
        return
    for file in files:
        if has_suffix(file.name, TEXTS):
            yield from re.split(r"\n\s*\n", read_text_file(file))
        else:
            yield from _texts(read_rows(file))


def local_files(source: str) -> list[Path] | None:
    """Return the files of a corpus that lies here, or None for one on the hub; UserError where there is none to read.

    What has a file's suffix is meant as a file, and what is there is never looked for on the hub.
    """
    path, suffixes = Path(source), (*ROWS, *TEXTS)
    if path.is_dir():
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        files = sorted(file for file in visible if has_suffix(file.name, suffixes))
        if not files:
            raise UserError(f"no {READ} or .txt file is in that folder", parameter="data.corpus", value=source)
        return files
    if not path.exists():
        if has_suffix(source, suffixes):
            raise UserError("no such file; correct the path", parameter="data.corpus", value=source)
        return None
    if not has_suffix(source, suffixes):
        raise UserError(f"of no kind that is read: {READ} or .txt", parameter="data.corpus", value=source)
    return [path]


def _texts(rows: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for where, row in rows:
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{where}: the field `text` is missing or no text; a corpus needs it")
        yield text


def _stream(source: str, revision: str) -> Iterator[object]:
    """Yield rows of a hub data set's training split, as they arrive."""
    from datasets import load_dataset

    try:
        yield from load_dataset(source, split="train", streaming=True, revision=revision or None)
    except Exception as error:  # the network, the hub and each file format have their own types
        raise UserError(f"it can't be loaded ({one_line(error)})", parameter="data.corpus", value=source) from error


def _shuffled(passages: Iterable[str], seed: int) -> Iterator[str]:
    """Yield passages in seeded order, each drawn from the next `SHUFFLED` that are left."""
    stream, draw = iter(passages), generator(seed, "corpus")
    buffer = list(islice(stream, SHUFFLED))
    while buffer:
        i = int(torch.randint(len(buffer), (), generator=draw))
        buffer[i], passage = buffer[-1], buffer[i]
        buffer.pop()
        buffer.extend(islice(stream, 1))
        yield passage


def pack(
    passages: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    train_blocks: int,
    heldout_blocks: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return training and held-out blocks, (N, T) int32 each, of shuffled passages joined by the end-of-text token.

    A passage goes wholly to one part, and one that comes again is left out. Held-out blocks are filled first, so that
    they stay the same whatever the training size; reading stops when both parts are full. UserError for no text, for
    too little of it, and for a tokenizer without an end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("its tokenizer has no end-of-text token to join passages with; use another", parameter="model")
    counts = {"data.heldout_blocks": heldout_blocks, "data.train_blocks": train_blocks}
    stream, seen = _shuffled(passages, seed), set[str]()
    parts = []
    for parameter, blocks in counts.items():
        tokens: list[int] = []
        while len(tokens) < blocks * block_size:
            passage = next(stream, None)
            if passage is None:
                raise _too_little(parameter, blocks, len(tokens) // block_size, block_size, empty=not seen)
            key = " ".join(passage.split())
            if key and key not in seen:
                seen.add(key)
                tokens += [*tokenizer(passage, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        parts.append(torch.tensor(tokens[: blocks * block_size], dtype=torch.int32).view(blocks, block_size))
    heldout, train = parts
    return train, heldout


def _too_little(parameter: str, blocks: int, full: int, block_size: int, *, empty: bool) -> UserError:
    if empty:
        return UserError("there is no text in it; name a corpus that has some", parameter="data.corpus")
    beside = " beside the held-out ones" if parameter == "data.train_blocks" else ""
    return UserError(
        f"the corpus gives {full} blocks of {block_size} tokens{beside}; lower {parameter} or give more text",
        parameter=parameter,
        value=blocks,
    )
