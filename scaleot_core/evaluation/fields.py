"""Rows of questions, which know their line in a file, and their fields as columns of a data set."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


class PlacedRow(dict[str, Any]):
    """A row that knows where it comes from, such as `records.jsonl, line 3`, however it is shuffled and cut."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields)
        self.where = where


def place(row: dict[str, Any], otherwise: str) -> str:
    """Return where a row comes from, or `otherwise` for one that doesn't know."""
    return row.where if isinstance(row, PlacedRow) else otherwise


def as_columns(rows: Rows) -> dict[str, list[Any]]:
    """Return the columns of a data set, each of the kind that most rows have there; any other value becomes None.

    Numbers that are all whole are integers, which pandas makes floats of where one is missing.
    """
    columns = {}
    for field in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(field) for row in rows]
        kinds = Counter(map(_kind, filter(_is_set, values)))
        kind = max(kinds, key=kinds.__getitem__, default=None)
        values = [value if _kind(value) == kind else None for value in values]
        stated: list[Any] = list(filter(_is_set, values))
        if not all(isinstance(value, bool) for value in stated):
            if kind is float and all(isinstance(value, int) or value.is_integer() for value in stated):
                numbers: list[Any] = values  # labels, by which lm-eval indexes, among them
                values = [int(number) if _is_set(number) else None for number in numbers]
            else:
                values = [int(value) if isinstance(value, bool) else value for value in values]
        columns[field] = values
    return columns


def _is_set(value: Any) -> bool:
    return value is not None and value == value  # NaN, which pandas writes for a missing text, is no kind of its own


def _kind(value: Any) -> type:
    return float if isinstance(value, bool | int) else type(value)
