"""The one error that a user can cause, and mend."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. Programs print it and exit with 1.

    An error that a parameter causes knows it by its key, such as `data.eval_questions`, and does not say where it was
    set: a stage says `params.yaml: data.eval_questions`, the command line `--data`.
    """

    def __init__(self, message: str, *, parameter: str = "", value: object = ...) -> None:
        """Take the message, and the parameter behind it, with its value where that is worth showing."""
        super().__init__(message)
        self.message, self.parameter, self.value = message, parameter, value

    def line(self, name: Callable[[str], str] = str) -> str:
        """Return the line that a person reads, with the parameter as `name` calls it."""
        if not self.parameter:
            return self.message
        shown = "" if self.value is ... else f" = {self.value!r}"
        return f"{name(self.parameter)}{shown}: {self.message}"

    def within(self, where: str) -> "UserError":
        """Return the same error with what it happened in before its message, such as a task."""
        return UserError(f"{where}: {self.message}", parameter=self.parameter, value=self.value)

    def __str__(self) -> str:
        return self.line()


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the error's type where it has no text."""
    text = str(error).strip()
    return printable(text.splitlines()[0]) if text else type(error).__name__


def printable(text: str) -> str:
    """Drop from a foreign text the characters that would steer a terminal."""
    return "".join(letter for letter in text if letter.isprintable())


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Let warnings and whatever is logged in a block be printable lines: libraries quote foreign settings in theirs."""
    new_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def printable_record(*fields: Any, **options: Any) -> logging.LogRecord:
        record = new_record(*fields, **options)
        record.msg, record.args = printable(" ".join(record.getMessage().split())), ()
        return record

    def printable_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return printable(f"{category.__name__}: {' '.join(str(message).split())}") + "\n"

    logging.setLogRecordFactory(printable_record)
    warnings.formatwarning = printable_line
    try:
        yield
    finally:
        logging.setLogRecordFactory(new_record)
        warnings.formatwarning = format_warning
