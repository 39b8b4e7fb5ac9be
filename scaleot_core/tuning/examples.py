"""What tuning sees: tokens and targets, of a task's questions or of the data owner's own records (method section 5)."""

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import parse_jsonl
from scaleot_core.evaluation.harness import lm
from scaleot_core.evaluation.tasks import Rows, answer_pairs, load_task, texts

IGNORED = -100  # no loss at this target

Example = tuple[list[int], list[int]]
"""Input tokens, and the target at each of them."""


def from_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Rows,
    *,
    block_size: int,
    packed: bool = True,
) -> list[Example]:
    """Every question of a task, split and cut exactly as lm-eval's scoring does it.

    Targets are those of the right answer, `IGNORED` elsewhere; an answer that evaluation generates ends in the
    end-of-text token, so that the model learns to stop. A question that is too long loses its beginning. Texts that are
    scored as a whole come in blocks of `block_size` tokens, each of which is a target; not `packed`, each is an example
    of its own. UserError where there are none.
    """
    view, loaded, size = lm(model, tokenizer), load_task(task, rows), block_size if packed else None
    if loaded.OUTPUT_TYPE == "loglikelihood_rolling":
        made = _texts([view.tok_encode(text) for text in texts(loaded)], _end(tokenizer, task), view.max_length, size)
    else:
        end = [_end(tokenizer, task)] if loaded.OUTPUT_TYPE == "generate_until" else []
        pairs = answer_pairs(loaded, tokenizer, context_length=view.max_length)
        encoded = (view._encode_pair(context, continuation) for context, continuation in pairs)
        made = [_cut([(before, False), (answer + end, True)], view.max_length) for before, answer in encoded]
    if not made:
        raise UserError(f"task {task}: there are no training questions")
    return made


def from_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, *, block_size: int, packed: bool = True
) -> list[Example]:
    """The records of a .jsonl file, all of one form: `prompt` and `completion`, `messages`, or `text`.

    Targets are the completion, or every message of the assistant, each with its end; of texts, packed into blocks,
    every token; not `packed`, each text is an example of its own. A record that is too long loses its beginning.
    UserError names the first line that is of no form, of another than the first, or without anything to learn.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: it can't be read ({one_line(error)})") from None
    view, end = lm(model, tokenizer), _end(tokenizer, str(file))

    def pair(row: dict[str, Any]) -> list[tuple[list[int], bool]]:
        before, answer = view._encode_pair(_text(row, "prompt"), _text(row, "completion"))
        return [(before, False), ([*answer, end], True)]

    def chat(row: dict[str, Any]) -> list[tuple[list[int], bool]]:
        return [(view.tok_encode(text), learnt) for text, learnt in _turns(tokenizer, row["messages"])]

    def text(row: dict[str, Any]) -> list[tuple[list[int], bool]]:
        return [(view.tok_encode(_text(row, "text")), True)]

    forms: dict[str, Callable[[dict[str, Any]], list[tuple[list[int], bool]]]] = {
        "completion": pair,
        "messages": chat,
        "text": text,
    }
    form, parts = None, []
    for number, row in parse_jsonl(str(file), lines):
        here = next((name for name in forms if name in row), None)
        form = form or here
        if here is None or here != form:
            what = f"`{form}` as in the lines before it" if form else "`prompt` and `completion`, `messages`, or `text`"
            raise UserError(f"{file}, line {number}: it needs {what}")
        try:
            found = forms[here](row)
            if not any(tokens for tokens, learnt in found if learnt):
                raise ValueError("there is nothing in it to learn")
            if form != "text" and len(found[-1][0]) > view.max_length:
                raise ValueError(f"its last answer has {len(found[-1][0])} tokens, the context {view.max_length}")
        except Exception as error:  # a chat template has its own types
            raise UserError(f"{file}, line {number}: {one_line(error)}") from None
        parts.append(found)
    if not parts:
        raise UserError(f"{file}: there is no record in it")
    if form == "text":
        encoded = [tokens for found in parts for tokens, _ in found]
        return _texts(encoded, end, view.max_length, block_size if packed else None)
    return [_cut(found, view.max_length) for found in parts]


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or (field != "prompt" and not value.strip()):
        raise ValueError(f"`{field}` is missing, empty or no text")
    return value


def _turns(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[tuple[str, bool]]:
    """A conversation as text in pieces, in the model's own template, and which of them the assistant says."""
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template; use `prompt` and `completion`")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError("`messages` is a list of objects with `role` and `content`")
    pieces, said = [], ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = str(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
            answered = str(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))
            if not asked.startswith(said) or not answered.startswith(asked):
                raise ValueError("the model's chat template doesn't keep what was said before; use `prompt`")
            pieces += [(asked[len(said) :], False), (answered[len(asked) :], True)]
            said = answered
    return pieces


def _end(tokenizer: PreTrainedTokenizerBase, what: str) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{what}: the model's tokenizer has no end-of-text token to end a text with; use another")
    return int(tokenizer.eos_token_id)


def _cut(parts: list[tuple[list[int], bool]], context_length: int) -> Example:
    """Parts one after another, with targets where they are learnt, at most as long as the context."""
    tokens = [token for part, _ in parts for token in part]
    targets = [token if learnt else IGNORED for part, learnt in parts for token in part]
    return tokens[-(context_length + 1) :][:-1], targets[-(context_length + 1) :][1:]


def _texts(encoded: Iterable[list[int]], end: int, context_length: int, block_size: int | None) -> list[Example]:
    """Texts, each with its end, packed into blocks as long as the context allows, or without a size one by one."""
    if block_size is None:
        return [_cut([([*text, end], True)], context_length) for text in encoded]
    block_size = min(block_size, context_length)
    tokens = list(chain.from_iterable([*text, end] for text in encoded))
    cuts = (tokens[start : start + block_size + 1] for start in range(0, len(tokens) - 1, block_size))
    return [(block[:-1], block[1:]) for block in cuts]


def collate(batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), padded on the right, where a causal model's answer tokens never look."""
    width = max(len(tokens) for tokens, _ in batch)
    inputs = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch])
    targets = torch.tensor([goal + [IGNORED] * (width - len(goal)) for _, goal in batch])
    return inputs, targets
