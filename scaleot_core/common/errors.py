"""The one error that a user can cause, and mend."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. Stages print it and exit with 1."""


def one_line(error: BaseException) -> str:
    """First line of an error's text, or its type where it has none: what another library said, kept short."""
    text = str(error).strip()
    return printable(text.splitlines()[0]) if text else type(error).__name__


def printable(text: str) -> str:
    """A text from elsewhere without what would steer a terminal."""
    return "".join(letter for letter in text if letter.isprintable())
