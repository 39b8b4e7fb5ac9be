"""Say what is wrong with a command line as other bad input is said: in one line."""

from typing import Any

import typer
from pydantic import ValidationError

from scaleot_core.common.errors import UserError
from scaleot_core.common.validation import Bounds

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]  # typer brings click's class, but no name for it


def user_error(error: Any) -> UserError:
    """Turn a usage error of typer's into the line that a person reads; it has no full stop at its end."""
    context = getattr(error, "ctx", None)
    look = f"`{context.command_path if context else 'scaleot'} --help` lists what there is"
    if hasattr(error, "param_type"):  # click's MissingParameter
        return UserError(f"{_name(error.param)} is missing; {look}")
    if hasattr(error, "possibilities"):  # NoSuchOption
        near = " or ".join(sorted(error.possibilities or ()))
        return UserError(f"{error.option_name} is no option; {f'is {near} meant? ' if near else ''}{look}")
    parameter = getattr(error, "param", None)
    if parameter is None:
        what = error.format_message().rstrip(".")
        return UserError(f"{what}{'' if what.endswith('?') else ';'} {look}")
    what, shown = error.message, ""
    if isinstance(error.__cause__, ValidationError):
        first = error.__cause__.errors(include_url=False)[0]
        what, shown = first["msg"].replace(f"'{first['input']}' ", "it "), f" = {first['input']}"
    bounds = Bounds(ge=getattr(parameter, "min", None), le=getattr(parameter, "max", None))
    what = what.removeprefix("Value error, ").partition(", unable to parse")[0].rstrip(".")
    return UserError(f"{_name(parameter)}{shown}: {what}; {bounds.text() or look}")


def is_help(error: Exception) -> bool:
    """Whether a usage error is that nothing was asked for, which the help answers."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _name(parameter: Any) -> str:
    """Name an option as it is typed, an argument in capitals."""
    name = str(max(parameter.opts, key=len))
    return name if name.startswith("-") else name.upper()
