"""Read what the data owner tunes on with the package's own tokenizer and chat template, in a child process."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.sandbox import Begin
    from scaleot_core.tuning.examples import Examples

RECORD_SECONDS = 300.0  # for one record; a task's questions are checked before the first
RECORDS_MEMORY, MEMORY_OF_BYTE = 4 * 2**30, 256  # bytes; a token takes some 60


def read_examples(
    package: "Package",
    task: str | None,
    data: Path | None,
    *,
    block_size: int,
    packed: bool,
    now: datetime | None = None,
) -> "Examples":
    """Make examples of the questions of a task, or, without one, of the records in a file.

    The date in a chat template is that of `now`, or today's. UserError names the first row that can't be used, and the
    package's file that takes too long or too much memory.
    """
    from pydantic import TypeAdapter

    from scaleot_core.data import questions
    from scaleot_core.evaluation.tasks import check_rows
    from scaleot_core.exchange.foreign_tokenizer import check_tokens, template_file
    from scaleot_core.exchange.sandbox import run_bounded
    from scaleot_core.models.families import context_length
    from scaleot_core.records.tally import Tally
    from scaleot_core.tuning.examples import Examples, from_file, from_task, tell

    model, tallies = package.meta_model, TypeAdapter(Tally)
    length = context_length(model.config)
    rows = questions.private(task, data) if task else []

    def read(begin: "Begin") -> Iterator[Any]:
        tokenizer = package.tokenizer()
        if task:
            check_rows(task, rows, tokenizer, context_length=length, part="training")
            examples = from_task(model, tokenizer, task, rows, block_size=block_size, packed=packed, begin=begin)
        else:
            assert data is not None
            examples = from_file(model, tokenizer, data, block_size=block_size, packed=packed, now=now, begin=begin)
        yield [tallies.dump_python(examples.tally, mode="json"), list(examples.origins), examples.block_size]
        yield from examples

    template = None if task else template_file(package)
    what = f"{package.folder}/tokenizer.json" + (f", or {template}" if template else "")
    memory = RECORDS_MEMORY + MEMORY_OF_BYTE * (data.stat().st_size if data and data.is_file() else 0)
    results = run_bounded(read, what=what, seconds=RECORD_SECONDS, memory=memory)
    tally, origins, size = next(results)
    pairs = [(tokens, targets) for tokens, targets in results]
    check_tokens(package, (tokens for tokens, _ in pairs))
    examples = Examples(pairs, tallies.validate_python(tally), origins=origins, block_size=size)
    tell(f"task {task}" if task else str(data), examples.tally, length)
    return examples
