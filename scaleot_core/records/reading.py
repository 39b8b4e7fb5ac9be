"""Read the data owner's own records, one after another, and encode them in whichever form they are."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line, printable
from scaleot_core.data.rows import Row, read_rows
from scaleot_core.records.chats import encode_chat
from scaleot_core.records.context import Context
from scaleot_core.records.encoding import Encoded, encode_pair, encode_text, without_post_processor
from scaleot_core.records.forms import chat_of, form_of, is_chat, other_form, text_of, unread_fields
from scaleot_core.records.rendering import LeftOut
from scaleot_core.records.tally import name_places


def encode_records(
    tokenizer: PreTrainedTokenizerBase, file: Path, context: Context, *, packed: bool
) -> Iterator[tuple[str, list[Encoded]]]:
    """Yield the form of each record of a file, that of the first, and its tokens in as many parts as it takes.

    Parts fit into the context, but for texts that are to be packed. UserError names the first record that is of no
    form, of another than the first, or without anything to learn, and one whose last answer is longer than the context.
    """
    form, bare, has_template = None, without_post_processor(tokenizer), tokenizer.chat_template is not None
    rows = read_rows(file)
    for where, row in rows:
        with context.tally.record(where.removeprefix(f"{file}, ")):
            try:
                form = _check_form(row, form, has_template=has_template)
                parts = _encode(tokenizer, bare, row, form, context, packed=packed)
            except LeftOut as error:
                raise UserError(f"{where}: {one_line(error)}{_others(rows, error.field)}") from None
            except ValueError as error:
                raise UserError(f"{where}: {one_line(error)}") from None
        yield form, parts
    if form is None:
        raise UserError(f"{file}: there is no record in it")


def _others(rows: Iterator[tuple[str, Row]], field: str) -> str:
    """Say where the rest of a file has a field too, as the end of a sentence; as far as it can be read."""
    places: list[str] = []
    with suppress(UserError):
        for where, row in rows:
            places += [where.rpartition(", ")[2]] if row.get(field) else []
    return f" (so have {name_places(places)})" if places else ""


def _check_form(row: Row, before: str | None, *, has_template: bool) -> str:
    """Return a row's form; ValueError if it has none, or another than the rows before it."""
    form = form_of(row)
    if form is None or (before and form != before):
        what = "`prompt` and `completion`, `messages`, or `text`"
        if before:
            what = f"`{before}` as in the lines before it; give all records of a file one form"
        hint = "" if form else other_form(row, has_template=has_template)
        if not (form or hint or before) and all(isinstance(value, str) for value in row.values()):
            hint = "; of a CSV file the first line has to name its fields"
        raise ValueError(f"it needs {what}{hint}")
    return form


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    bare: PreTrainedTokenizerBase,
    row: Row,
    form: str,
    context: Context,
    *,
    packed: bool,
) -> list[Encoded]:
    """Encode a row; `bare` is the tokenizer without its post-processor."""
    row = {name: value for name, value in row.items() if value is not None}
    context.tally.ignored.update(printable(name) for name in unread_fields(row, form))
    if is_chat(row, form):
        parts = encode_chat(bare, chat_of(row, form), context)
        return context.fit(parts, packed=packed, bos=tokenizer.bos_token_id)
    prompt = text_of(row, "prompt") if form == "completion" else None
    text = text_of(row, form)
    if tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no end-of-text token to end it with; use another")
    if prompt is None:
        encoded = encode_text(tokenizer, text)
        return [encoded if packed else context.cut(encoded)]
    context.tally.untemplated += tokenizer.chat_template is not None
    return context.fit([encode_pair(tokenizer, prompt, text)], packed=packed, bos=tokenizer.bos_token_id)
