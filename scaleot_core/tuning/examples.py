"""What tuning sees: tokens and targets, of a task's questions or of the data owner's own records (method section 5)."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import say
from scaleot_core.evaluation.harness import lm
from scaleot_core.evaluation.tasks import Rows, answer_pairs, load_task, texts
from scaleot_core.models.families import context_length
from scaleot_core.records.tally import CUT, PRIVATE, Tally

IGNORED = -100  # no loss at this target

Example = tuple[list[int], list[int]]
"""Input tokens, and the target at each of them."""


class Examples(list[Example]):
    """Examples, and what they were made of."""

    def __init__(
        self,
        examples: Iterable[Example],
        tally: Tally,
        *,
        origins: Sequence[int] | None = None,
        are_blocks: bool = False,
    ) -> None:
        super().__init__(examples)
        self.tally = tally
        self.origins = range(len(self)) if origins is None else origins
        """Of each example, the number of the record that it comes from; of a block, its own."""
        self.are_blocks = are_blocks
        """Whether they are blocks of packed texts."""


def from_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Rows,
    *,
    block_size: int,
    packed: bool = True,
) -> Examples:
    """Make an example of every question of a task, split and cut exactly as lm-eval's scoring does it.

    Targets are those of the right answer, `IGNORED` elsewhere; an answer that evaluation generates ends in the
    end-of-text token, so that the model learns to stop. A question that is too long loses its beginning, and that is
    said. Texts that are scored as a whole come in blocks of `block_size` tokens, each of which is a target; not
    `packed`, each is an example of its own. UserError where there are none.
    """
    view, loaded = lm(model, tokenizer), load_task(task, rows)
    tally = Tally(view.max_length)
    if loaded.OUTPUT_TYPE == "loglikelihood_rolling":
        end = _end(tokenizer, task)
        encoded = [[*view.tok_encode(text), end] for text in texts(loaded)]
        tally.records = len(encoded)
        made = _from_texts(encoded, tally, block_size if packed else None)
    else:
        ends = [_end(tokenizer, task)] if loaded.OUTPUT_TYPE == "generate_until" else []
        cut = []
        for context, continuation in answer_pairs(loaded, tokenizer, context_length=view.max_length):
            before, answer = view._encode_pair(context, continuation)
            tokens = [*before, *answer, *ends]
            tally.count_cut(_excess(tokens, tally))
            cut.append(_cut(tokens, [(len(before), len(tokens))], tally))
        tally.records = len(cut)
        made = Examples(cut, tally)
    if not made:
        raise UserError(f"task {task}: there are no training questions")
    _tell(f"task {task}", tally)
    return made


def from_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, *, block_size: int, packed: bool = True
) -> Examples:
    """Make examples of the records in a file, all of one form: a prompt and completion, a conversation, or a text.

    Targets are the completion, or every answer of the assistant, each with its end; of texts, packed into blocks, every
    token. A record that is too long loses its beginning: a conversation its oldest turns. Not `packed`, a record is one
    example, as privacy needs it: of a conversation that takes several, the last. What isn't learnt is said. UserError
    names the first record that can't be used (`encode_records`).
    """
    from scaleot_core.records.encoded import encode_records  # no stage comes by here

    tally = Tally(context_length(model.config))
    whole: list[list[int]] = []
    made: list[Example] = []
    origins: list[int] = []
    for number, record in enumerate(encode_records(tokenizer, file, tally)):
        if record.is_text:
            whole.append(record.parts[0].tokens)
            continue
        parts = record.parts if packed else record.parts[-1:]
        if left_out := sum(len(part.learnt) for part in record.parts[: -len(parts)]):
            tally.answers_left_out[PRIVATE] += left_out
        tally.count_cut(record.tokens_cut + sum(_excess(part.tokens, tally) for part in parts))
        for part in parts:
            excess = _excess(part.tokens, tally)
            kept = [(first, last) for first, last in part.learnt if not excess or first > excess]
            if len(kept) < len(part.learnt):  # an answer that has lost its own beginning
                tally.answers_left_out[CUT] += len(part.learnt) - len(kept)
            made.append(_cut(part.tokens, kept, tally, bos=tokenizer.bos_token_id))
            origins.append(number)
    size = block_size if packed else None
    found = _from_texts(whole, tally, size) if whole else Examples(made, tally, origins=origins)
    _tell(str(file), tally)
    return found


def _end(tokenizer: PreTrainedTokenizerBase, what: str) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{what}: the model's tokenizer has no end-of-text token to end a text with; use another")
    return int(tokenizer.eos_token_id)


def _tell(what: str, tally: Tally) -> None:
    for line in tally.lines():
        say(f"{what}: {line}", style="yellow")


def _excess(tokens: Sequence[int], tally: Tally) -> int:
    """How many tokens there are too many: the last one is a target alone."""
    return max(0, len(tokens) - tally.context_length - 1)


def _cut(tokens: Sequence[int], learnt: Sequence[tuple[int, int]], tally: Tally, bos: int | None = None) -> Example:
    """Make an example, with targets where it is learnt, at most as long as the context.

    What is too much goes at the beginning, behind a BOS where there is one.
    """
    start = _excess(tokens, tally)
    targets = [IGNORED] * len(tokens)
    for first, last in learnt:
        targets[first:last] = tokens[first:last]
    inputs = list(tokens[start:-1])
    if start and tokens[0] == bos:
        inputs[0] = tokens[0]
    return inputs, targets[start + 1 :]


def _from_texts(texts: list[list[int]], tally: Tally, block_size: int | None) -> Examples:
    """Make examples of texts, each with its end: packed into blocks as long as the context allows, or one by one."""
    if block_size is None:
        for text in texts:
            tally.count_cut(_excess(text, tally))
        return Examples([_cut(text, [(0, len(text))], tally) for text in texts], tally)
    block_size = min(block_size, tally.context_length)
    tokens = list(chain.from_iterable(texts))
    cuts = (tokens[start : start + block_size + 1] for start in range(0, len(tokens) - 1, block_size))
    return Examples([(block[:-1], block[1:]) for block in cuts], tally, are_blocks=True)


def collate(batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), padded on the right, where a causal model's answer tokens never look."""
    width = max(len(tokens) for tokens, _ in batch)
    inputs = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch])
    targets = torch.tensor([goal + [IGNORED] * (width - len(goal)) for _, goal in batch])
    return inputs, targets
