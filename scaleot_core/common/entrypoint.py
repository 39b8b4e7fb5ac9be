"""Start and end a program: on any terminal, as one process or several; well, or in one line and an exit code.

Light to import, so that `--help` is quick.
"""

import io
import logging
import signal
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from scaleot_core.common.errors import UserError, one_line, printable, printable_warnings
from scaleot_core.common.launch import check_launch, is_main_process
from scaleot_core.common.progress import console, say


def run_command(main: Callable[[], None], called: Callable[[str], str] = "params.yaml: {}".format) -> None:
    """Run `main`; a UserError or a failing disk ends in one line and exit code 1, an interruption in 130.

    `called` gives the name by which the user knows a parameter. SIGTERM is an interruption too, so that what is half
    written is removed. Letters that the terminal has no code for are printed as question marks. Of several processes
    only the first prints.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a kernel package that nothing here needs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        check_launch()
        console.quiet = not is_main_process()
        with printable_warnings():
            main()
    except UserError as error:
        say(f"error: {printable(error.line(called))}", style="bold red")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last checkpoint", style="yellow")
        sys.exit(130)
    except (OSError, SafetensorError) as error:  # transformers writes a model through safetensors' own error
        name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        what = f"{name or 'a file'}: {reason or one_line(error)}"
        say(f"error: {what}; free space or mend it, then run again", style="bold red")
        sys.exit(1)
