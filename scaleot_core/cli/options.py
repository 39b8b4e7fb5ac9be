"""The options that commands share, and how a person calls a parameter at the command line."""

from pathlib import Path
from typing import Annotated

import typer

OPTIONS = {  # by the parameter, where names differ
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
AdapterArgument = Annotated[Path, typer.Argument(help="The adapter that came back: a folder or .zip.")]


def option_name(parameter: str) -> str:
    """Give what a person at the command line calls a parameter: its option or argument."""
    name = next((part for part in reversed(parameter.split(".")) if not part.isdigit()), parameter)
    return OPTIONS.get(parameter, f"--{name.replace('_', '-')}")
