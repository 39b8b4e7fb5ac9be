"""The command line of the two parties: `scaleot pack`, `inspect`, `tune`, `audit`, `check`, `plug` and `trace`.

What a command needs is imported when it runs, so that `--help` is quick and the data owner needs no DVC.
"""

import sys

import typer

from scaleot_core.cli.audit import audit
from scaleot_core.cli.data_owner import tune
from scaleot_core.cli.inspection import inspect
from scaleot_core.cli.model_owner import check, pack, plug
from scaleot_core.cli.options import option_name
from scaleot_core.cli.trace import trace
from scaleot_core.cli.usage import USAGE_ERROR, is_help, user_error
from scaleot_core.common.entrypoint import run_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a language model that one party won't give away on data that another won't show. The model owner packs "
    "an emulator and ships it; the data owner tunes adapters in it and sends only them back; the model owner checks "
    "them and plugs them into the real model.",
)
app.command()(pack)
app.command()(inspect)
app.command()(tune)
app.command()(audit)
app.command()(check)
app.command()(plug)
app.command()(trace)


def main() -> None:
    """Run the command line. What typer has to say of it ends in one line and exit code 1, as all bad input does."""
    run_command(_run, option_name)


def _run() -> None:
    try:
        code = app(prog_name="scaleot", standalone_mode=False)  # of `--help` and of Ctrl-C; a command gives None
    except USAGE_ERROR as error:
        if is_help(error):
            typer.echo(str(error), err=True)
            sys.exit(2)
        raise user_error(error) from None
    sys.exit(code or 0)
