"""Encode the data owner's own records, one after another, in whichever form they are."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line, printable
from scaleot_core.data.rows import Row, read_rows
from scaleot_core.records.chats import encode_chat
from scaleot_core.records.encoding import Encoded, encode_pair, encode_text, without_post_processor
from scaleot_core.records.forms import Chat, Pair, form_of, other_form, parse_record
from scaleot_core.records.rendering import LeftOut
from scaleot_core.records.tally import CUT, TOO_LONG, UNASKED, UNSAID, Tally, name_places


@dataclass(frozen=True)
class EncodedRecord:
    """A record's tokens, in as many parts as it takes, the last of which has its last answer."""

    is_text: bool
    parts: list[Encoded]
    tokens_cut: int = 0
    """Tokens that it has lost already."""


def encode_records(tokenizer: PreTrainedTokenizerBase, file: Path, tally: Tally) -> Iterator[EncodedRecord]:
    """Yield the records of a file, all of the form of the first; `tally` is told what is left out.

    UserError names the first record that is of no form, of another than the first, or without anything to learn, and
    one whose last answer is longer than the context.
    """
    form, bare, has_template = None, without_post_processor(tokenizer), tokenizer.chat_template is not None
    rows = read_rows(file)
    for where, row in rows:
        place = where.removeprefix(f"{file}, ")
        with tally.noting(place):
            try:
                form = _check_form(row, form, has_template=has_template)
                record = _encode(tokenizer, bare, row, tally)
            except LeftOut as error:
                raise UserError(f"{where}: {one_line(error)}{_others(rows, error.field)}") from None
            except ValueError as error:
                raise UserError(f"{where}: {one_line(error)}") from None
            tally.records += 1
            yield record  # whoever takes it cuts it, before coming back
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
    """Give a row's form; ValueError if it has none, or another than the rows before it."""
    form = form_of(row)
    if form is None or (before and form != before):
        what = "`prompt` and `completion`, `messages`, or `text`"
        if before:
            what = f"`{before}` as in the lines before it; give all records of a file one form"
        raise ValueError(f"it needs {what}{'' if form else other_form(row, has_template=has_template)}")
    return form


def _encode(tokenizer: PreTrainedTokenizerBase, bare: PreTrainedTokenizerBase, row: Row, tally: Tally) -> EncodedRecord:
    """Encode a row; `bare` is the tokenizer without its post-processor."""
    record, ignored = parse_record(row)
    tally.ignored.update(printable(name) for name in ignored)
    if not isinstance(record, Chat):
        if tokenizer.eos_token_id is None:
            raise ValueError("the model's tokenizer has no end-of-text token to end it with; use another")
        if not isinstance(record, Pair):
            return EncodedRecord(True, [encode_text(tokenizer, record.text)])
        pair = encode_pair(tokenizer, record.prompt, record.completion)
        _check_length(pair, tally.context_length)
        tally.untemplated += tokenizer.chat_template is not None
        return EncodedRecord(False, [pair])
    chat = encode_chat(bare, record, context_length=tally.context_length)
    *before, last = chat.parts
    _check_length(last, tally.context_length)
    fitting = [part for part in before if _answer_length(part) <= tally.context_length]
    tally.ignored.update(f"messages: {printable(name)}" for name in chat.ignored)
    tally.reworded += chat.reworded
    tally.switched_off += record.switched_off
    left_out = {CUT: chat.answers_cut, UNASKED: chat.unasked, UNSAID: chat.unsaid, TOO_LONG: len(before) - len(fitting)}
    tally.answers_left_out.update({reason: count for reason, count in left_out.items() if count})
    return EncodedRecord(False, [*fitting, last], chat.tokens_cut)


def _answer_length(encoded: Encoded) -> int:
    first, last = encoded.learnt[-1]
    return last - first


def _check_length(encoded: Encoded, context_length: int) -> None:
    if _answer_length(encoded) > context_length:
        raise ValueError(
            f"its last answer has {_answer_length(encoded):,} tokens, the context {context_length:,}; "
            "shorten it, or delete the record"
        )
