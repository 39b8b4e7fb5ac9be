"""Say in one line what is wrong with a command line, as for other bad input."""

from typing import Any

import typer
from pydantic import ValidationError

from scaleot_core.common.errors import UserError
from scaleot_core.common.validation import Bounds

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]  # typer brings click's class, but no name for it


def user_error(error: Any) -> UserError:
    """Turn typer's usage error into a line without a full stop at its end."""
    context = getattr(error, "ctx", None)
    hint = f"`{context.command_path if context else 'scaleot'} --help` lists what there is"
    if hasattr(error, "param_type"):  # click's MissingParameter
        return UserError(f"{_name(error.param)} is missing; {hint}")
    if hasattr(error, "possibilities"):  # NoSuchOption
        similar = " or ".join(sorted(error.possibilities or ()))
        return UserError(f"{error.option_name} is no option; {f'is {similar} meant? ' if similar else ''}{hint}")
    parameter = getattr(error, "param", None)
    if parameter is None:
        message = error.format_message().rstrip(".")
        return UserError(f"{message}{'' if message.endswith('?') else ';'} {hint}")
    message, value = error.message, ""
    if isinstance(error.__cause__, ValidationError):
        first = error.__cause__.errors(include_url=False)[0]
        message, value = first["msg"].replace(f"'{first['input']}' ", "it "), f" = {first['input']}"
    bounds = Bounds(ge=getattr(parameter, "min", None), le=getattr(parameter, "max", None))
    message = message.removeprefix("Value error, ").partition(", unable to parse")[0].rstrip(".")
    return UserError(f"{_name(parameter)}{value}: {message}; {bounds.text() or hint}")


def is_help(error: Exception) -> bool:
    """Tell whether a usage error is that nothing was asked for, which the help answers."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _name(parameter: Any) -> str:
    """Name an option as it is typed, an argument in capitals."""
    name = str(max(parameter.opts, key=len))
    return name if name.startswith("-") else name.upper()
