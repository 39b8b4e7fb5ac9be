"""Make what tuning sees of a task's questions, or of the data owner's own records (method section 5)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
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
from scaleot_core.records.context import Context
from scaleot_core.records.encoding import Encoded
from scaleot_core.records.reading import encode_records
from scaleot_core.records.tally import Tally

IGNORED = -100  # no loss at this target

Example = tuple[list[int], list[int]]
"""Input tokens, and the target at each of them."""


class Examples(list[Example]):
    """Examples, and what they were made of."""

    def __init__(
        self,
        examples: Iterable[Example],
        tally: Tally | None = None,
        *,
        origins: Sequence[int] | None = None,
        block_size: int | None = None,
    ) -> None:
        super().__init__(examples)
        self.tally = Tally() if tally is None else tally
        self.origins = range(len(self)) if origins is None else origins
        """Of each example, the number of the record that it comes from; of a block, its own."""
        self.block_size = block_size
        """Tokens of a block of packed texts; None where examples are no blocks."""


def from_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Rows,
    *,
    block_size: int,
    packed: bool = True,
    begin: Callable[[str], object] = str,
) -> Examples:
    """Make an example of every question of a task, split and cut exactly as lm-eval's scoring does it.

    Targets are those of the right answer, `IGNORED` elsewhere; an answer that evaluation generates ends in the
    end-of-text token, so that the model learns to stop. A question that is too long loses its beginning, and that is
    said. Texts that are scored as a whole come in blocks of `block_size` tokens, each of which is a target; not
    `packed`, each is an example of its own. `begin` is told after which question the next begins. UserError where there
    are none.
    """
    view, loaded = lm(model, tokenizer), load_task(task, rows)
    context = Context(view.max_length)
    is_text, generates = loaded.OUTPUT_TYPE == "loglikelihood_rolling", loaded.OUTPUT_TYPE == "generate_until"
    if (is_text or generates) and tokenizer.eos_token_id is None:
        raise UserError(f"{task}: the model's tokenizer has no end-of-text token to end a text with; use another")

    def encoded() -> Iterator[Encoded]:
        if is_text:
            for text in texts(loaded):
                tokens = [*view.tok_encode(text), tokenizer.eos_token_id]
                yield Encoded(tokens, [(0, len(tokens))])
            return
        for question, answer in answer_pairs(loaded, tokenizer, context_length=view.max_length):
            before, after = view._encode_pair(question, answer)
            tokens = [*before, *after, *([tokenizer.eos_token_id] if generates else [])]
            yield Encoded(tokens, [(len(before), len(tokens))])

    records = []
    for number, record in enumerate(encoded(), start=1):
        with context.tally.record(f"question {number}"):
            records.append(record if is_text and packed else context.cut(record))
        begin(f"after question {number:,}")
    examples = _pack(records, context, block_size) if is_text and packed else _examples(records, context)
    if not examples:
        raise UserError(f"task {task}: there are no training questions")
    tell(f"task {task}", context.tally, context.length)
    return examples


def from_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    *,
    block_size: int,
    packed: bool = True,
    now: datetime | None = None,
    begin: Callable[[str], object] = str,
) -> Examples:
    """Make examples of the records in a file, all of one form: a prompt and completion, a conversation, or a text.

    Targets are the completion, or every answer of the assistant, each with its end; of texts, packed into blocks, every
    token. A record that is too long loses its beginning: a conversation its oldest turns. Not `packed`, a record is one
    example, as privacy needs it: of a conversation that takes several, the last. The date in a chat template
    is that of `now`, or today's. What isn't learnt is said, and `begin` is told after which record the next begins.
    UserError names the first record that can't be used (`encode_records`).
    """
    context = Context(context_length(model.config), now=now)
    records: list[Encoded] = []
    origins: list[int] = []
    is_packed = False
    for number, (form, parts) in enumerate(encode_records(tokenizer, file, context, packed=packed)):
        records += parts
        origins += [number] * len(parts)
        is_packed = form == "text" and packed
        begin(f"after record {number + 1:,}")
    examples = _pack(records, context, block_size) if is_packed else _examples(records, context, origins)
    tell(str(file), context.tally, context.length)
    return examples


def tell(what: str, tally: Tally, context_length: int) -> None:
    """Say what of some records isn't learnt."""
    for line in tally.lines(context_length):
        say(f"{what}: {line}", style="yellow")


def _examples(records: Iterable[Encoded], context: Context, origins: Sequence[int] | None = None) -> Examples:
    """Make an example of each record that fits into the context, with targets where it is learnt."""
    examples = []
    for record in records:
        targets = [IGNORED] * len(record.tokens)
        for first, last in record.learnt:
            targets[first:last] = record.tokens[first:last]
        examples.append((record.tokens[:-1], targets[1:]))
    return Examples(examples, context.tally, origins=origins)


def _pack(texts: Iterable[Encoded], context: Context, block_size: int) -> Examples:
    """Make blocks of texts, each with its end, as long as the context allows."""
    block_size = min(block_size, context.length)
    tokens = list(chain.from_iterable(text.tokens for text in texts))
    blocks = (tokens[start : start + block_size + 1] for start in range(0, len(tokens) - 1, block_size))
    return Examples([(block[:-1], block[1:]) for block in blocks], context.tally, block_size=block_size)


def collate(batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T), padded on the right, where a causal model's answer tokens never look."""
    width = max(len(tokens) for tokens, _ in batch)
    inputs = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch])
    targets = torch.tensor([goal + [IGNORED] * (width - len(goal)) for _, goal in batch])
    return inputs, targets
