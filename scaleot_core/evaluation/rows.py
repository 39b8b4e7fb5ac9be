"""Name the row, and the field in it, that a task's definition can't use.

lm-eval gives a row None for a field that it lacks, and a template prints that: "Question: None". A Python function
stumbles over it somewhere inside. Whoever brought the rows is told the line of their own file, the field and its value.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from scaleot_core.common.errors import UserError, one_line, printable

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Rows = Sequence[dict[str, Any]]
Build = Callable[[Rows], "Task"]
"""Make lm-eval's task on some rows."""
MARK = "\ue000"  # a letter of nobody's, which a template leaves as it is


class PlacedRow(dict[str, Any]):
    """A row that knows where it lies in what it came from, however it is shuffled and cut."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields)
        self.where = where


def place(row: dict[str, Any], otherwise: str) -> str:
    """Return where a row lies in what it came from, or `otherwise` for one that doesn't know."""
    return row.where if isinstance(row, PlacedRow) else otherwise


def fields_of(rows: Rows) -> list[str]:
    """Return the names of all fields that some row has, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def described(row: dict[str, Any], field: str) -> str:
    """Say what a row has under a name."""
    if field not in row:
        return f"the field `{printable(field)}` is missing"
    value = row[field]
    if value is None:
        return f"the field `{printable(field)}` is null"
    text = printable(repr(value))
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return f"`{printable(field)}` is {shown} ({_kind(value)})"


def unfit(where: str, rows: Rows, build: Build, error: Exception, *, part: str) -> UserError:
    """Return the error that names the first row on which a task can't be made, and what about it.

    `error` is what came of all rows. Where no row fits, they are those of another task.
    """
    reason = f"{type(error).__name__}: {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
    index = _first_unfit(rows, build)
    row, others = rows[index], [*rows[:index], *rows[index + 1 : index + 4]]
    fitting = next((other for other in others if _made(build, [other])), None)
    here = place(row, f"{part} row {index + 1}")
    blamed = _blamed(row, error)
    if fitting is not None:
        names = fields_of([row, fitting])
        blamed = [f for f in names if _made(build, [_with(row, f, fitting.get(f))])] or blamed
    elif not blamed:
        has = ", ".join(printable(name) for name in row)
        return UserError(f"{where}: its rows don't fit lm-eval's definition ({reason}); {here} has the fields {has}")
    what = ", ".join(described(row, field) for field in blamed[:3]) or "the row doesn't fit"
    if fitting is None:
        return UserError(f"{where}: its rows don't fit lm-eval's definition ({reason}); {here}: {what}")
    return UserError(f"{where}, {here}: {what}, which lm-eval's definition can't use ({reason})")


def _first_unfit(rows: Rows, build: Build) -> int:
    """Return the index of the first row with which those up to it make no task."""
    fit, unfit = 0, len(rows)
    while unfit - fit > 1:
        middle = (fit + unfit) // 2
        fit, unfit = (middle, unfit) if _made(build, rows[:middle]) else (fit, middle)
    return unfit - 1


def _made(build: Build, rows: Rows) -> "Task | None":
    try:
        return build(rows)
    except Exception:  # whatever a definition does with a row that it can't use
        return None


def _blamed(row: dict[str, Any], error: Exception) -> list[str]:
    """Return the fields that an error speaks of: one that is looked up in vain, or whose value is."""
    if isinstance(error, KeyError) and error.args:
        key = error.args[0]
        return [name for name, value in row.items() if type(value) is type(key) and value == key] or (
            [key] if isinstance(key, str) and key not in row else []
        )
    undefined = re.fullmatch(r"'(\w+)' is undefined", one_line(error))  # of a template
    return [undefined[1]] if undefined and undefined[1] not in row else []


def _with(row: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    return {**row, field: value}


def check_filled(task: "Task", where: str, rows: Rows, build: Build, *, part: str) -> None:
    """UserError for the first row in which the definition reads a field that is missing, null or of another kind.

    A field that the definition doesn't read may be anything. A name that no row has as a field lm-eval takes for text.
    """
    answer = task.config.doc_to_target if task.OUTPUT_TYPE != "multiple_choice" else None  # where it must be a choice
    for source in (task.config.doc_to_text, answer):
        if isinstance(source, str) and source.isidentifier() and source not in task.features:
            raise UserError(f"{where}, {place(rows[0], f'{part} row 1')}: {described({}, source)}, as in all rows")
    suspect = list(_suspect(rows))
    docs = task.training_docs() if suspect else ()
    for index, fields in suspect:
        row = rows[index]
        if len(docs) == len(rows) and not _may_print(task, docs[index]):
            continue
        for field in fields:
            usual = _usual(rows, field)
            if _reads(row, field, build, usual):
                other = "" if _unset(row.get(field)) else f", and {_kind(usual)} in other rows"
                raise UserError(f"{where}, {place(row, f'{part} row {index + 1}')}: {described(row, field)}{other}")


def as_columns(rows: Rows) -> dict[str, list[Any]]:
    """Return rows as columns of one kind each, as a data set has them; what is of another kind is left out.

    `check_filled` looks at what is left out.
    """
    columns = {}
    for field in fields_of(rows):
        kind = _kind(_usual(rows, field))
        values = [row.get(field) if _kind(row.get(field)) == kind else None for row in rows]
        if any(isinstance(value, bool) for value in values) and not all(isinstance(v, bool | None) for v in values):
            values = [int(value) if isinstance(value, bool) else value for value in values]
        columns[field] = values
    return columns


def _suspect(rows: Rows) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows, by index, with fields that are unset or of another kind than in most other rows."""
    usual = {name: _kind(_usual(rows, name)) for name in fields_of(rows)}
    for index, row in enumerate(rows):
        if odd := [name for name, kind in usual.items() if _unset(row.get(name)) or _kind(row[name]) != kind]:
            yield index, odd


def _usual(rows: Rows, field: str) -> Any:
    """Return a field's value in the first row that has one of the kind that most rows have."""
    values = [row[field] for row in rows if not _unset(row.get(field))]
    most = Counter(map(_kind, values)).most_common(1)
    return next((value for value in values if _kind(value) == most[0][0]), None)


def _kind(value: Any) -> str:
    """Say in a word or two what a value is."""
    if isinstance(value, bool | int | float):
        return "a number"
    kinds: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "nothing" if value is None else "a value")


def _unset(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _may_print(task: "Task", doc: dict[str, Any]) -> bool:
    """Tell whether a value that isn't set may be in what a definition makes of a question, or fails it."""
    try:
        text = _rendered(task, doc).casefold()
    except Exception:
        return True
    return "none" in text or "nan" in text


def _rendered(task: "Task", doc: dict[str, Any]) -> str:
    parts = [task.doc_to_text(doc), task.doc_to_target(doc)]
    if task.OUTPUT_TYPE == "multiple_choice":
        parts.append(task.doc_to_choice(doc))
    return "\n".join(map(str, parts))


def _reads(row: dict[str, Any], field: str, build: Build, usual: Any) -> bool:
    """Tell whether a definition prints a field's value, or fails for it: a letter in its place shows up, and `usual`,
    which another row has there, does not fail.
    """

    def rendered(fields: dict[str, Any]) -> str | None:
        task = _made(build, [fields])
        try:
            return _rendered(task, next(iter(task.training_docs()))) if task else None
        except Exception:
            return None

    asis, marked = rendered(_with(row, field, row.get(field))), rendered(_with(row, field, MARK))
    if asis is None:
        return rendered(_with(row, field, usual)) is not None
    printed = str(row.get(field))
    return marked is not None and MARK in marked and asis.casefold() == marked.replace(MARK, printed).casefold()


def label_fields(task: "Task", doc: dict[str, Any]) -> list[str]:
    """Return the fields of a question that a definition reads its answer from."""
    source: Any = task.config.doc_to_text if task.multiple_input else task.config.doc_to_target
    if isinstance(source, str):
        from jinja2 import meta
        from lm_eval.utils import env

        names = [source] if source.isidentifier() else meta.find_undeclared_variables(env.parse(source))
    elif callable(source):
        noting = _Noting(doc)
        try:
            source(noting)
        except Exception:  # what it read until then is what is asked
            noting.read.reverse()
        names = noting.read
    else:
        names = []
    return list(dict.fromkeys(names))


class _Noting(dict[str, Any]):
    """A question that notes which of its fields are read."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.read.append(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.append(name)
        return super().get(name, default)
