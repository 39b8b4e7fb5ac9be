"""Options that commands share, options that are settings, and the name of a parameter at the command line."""

from pathlib import Path
from typing import Annotated, Any

import typer

from scaleot_core.common.validation import Block

OPTIONS = {  # by parameter, where the names differ
    "tasks": "--task",
    "data.questions": "--data",
    "data.corpus": "--public",
    "model": "BASE",
    "validation_fraction": "--validation",
    "rank": "--lora-rank",
    "alpha": "--lora-alpha",
    "modules": "--lora-modules",
}

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
PackageOption = Annotated[Path, typer.Option("--package", help="The package that was shipped: a folder or .zip.")]
SignOption = Annotated[
    Path | None,
    typer.Option("--sign", help="Your private key (PEM, of an elliptic curve): sign with it (extra `signing`)."),
]
AdapterArgument = Annotated[Path, typer.Argument(help="The adapter that came back: a folder or .zip.")]


def setting(block: type[Block], name: str, note: str = "") -> Any:
    """Make the option of a setting, described and limited as its field is; the command adds `note`."""
    field = block.model_fields[name]
    limits = {
        option: getattr(limit, bound)
        for limit in field.metadata
        for option, bound in (("min", "ge"), ("max", "le"))
        if hasattr(limit, bound)
    }
    return typer.Option(help=f"{_sentence(field.description or '')} {note}".strip(), **limits)


def _sentence(description: str) -> str:
    """Make a sentence of a field's description; a Greek symbol at its start stays as it is."""
    first = description[:1]
    return f"{first.upper() if first.isascii() else first}{description[1:]}."


def option_name(parameter: str) -> str:
    """Return what a parameter is called at the command line: its option or argument."""
    name = next((part for part in reversed(parameter.split(".")) if not part.isdigit()), parameter)
    return OPTIONS.get(parameter) or OPTIONS.get(name, f"--{name.replace('_', '-')}")
