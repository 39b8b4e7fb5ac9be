"""Run what a foreign file makes of a text in a child process, of bounded memory and time, that ends with this one.

A chat template is a program, and so are a tokenizer's normalizer and its regular expressions. No signal interrupts them
where they run in compiled code; a process of their own can be killed at any time, by the kernel too.
"""

import faulthandler
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

import psutil

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.progress import console

LONGEST_LINE = 2**28  # bytes of one result
GIB = 2**30

Begin = Callable[[str], None]
"""Begin the next step, which has all the time anew; an error names it."""


def run_bounded(work: Callable[[Begin], Iterable[Any]], *, what: str, seconds: float, memory: int) -> Iterator[Any]:
    """Yield what `work` yields, as JSON has it, from a child process; each step of it has `seconds`.

    `work` is given a function that begins a step; a yield begins one as well. The child may take `memory` (bytes) more
    than this process has, prints nothing, and is killed when the caller is done, interrupted or failing. UserError,
    which begins with `what`, where it takes more, longer, or fails; one that the child raises comes as it is.
    """
    with tempfile.TemporaryDirectory(prefix="scaleot-") as scratch:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads are torch's, which isn't used there
            child = os.fork()
        if not child:
            _run_child(work, writing, scratch, seconds=seconds, memory=memory)
        os.close(writing)
        status, step, failure = 0, "", ""
        try:
            with open(reading, "rb") as stream:
                while (line := stream.readline(LONGEST_LINE)).endswith(b"\n"):
                    kind, value = json.loads(line)
                    if kind == "result":
                        yield value
                    elif kind == "step":
                        step = f", {value}" if value else ""
                    elif kind == "error":
                        raise UserError(value.pop("message"), **value)
                    else:
                        failure = value
            _, status = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if killed == signal.SIGALRM:
        failure = f"no end after {seconds:g} s"
    elif killed == signal.SIGABRT or failure == MemoryError.__name__:
        failure = f"it takes more than {memory / GIB:.1f} GiB of memory, or crashes"
    elif killed or (status and not failure):
        failure = f"it crashed ({signal.strsignal(killed) if killed else status})"
    if failure:
        raise UserError(f"{what}{step}: {failure}; don't use it, ask whoever made it")


def _run_child(
    work: Callable[[Begin], Iterable[Any]], writing: int, scratch: str, *, seconds: float, memory: int
) -> NoReturn:
    """Send the results, or the error, as lines of JSON; never return."""
    code = 1
    try:
        _isolate(scratch, memory)
        with open(writing, "wb") as stream:

            def send(kind: str, value: Any) -> None:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                stream.write(json.dumps([kind, value], default=str).encode() + b"\n")
                stream.flush()

            send("step", "")
            try:
                for result in work(lambda place: send("step", place)):
                    send("result", result)
            except UserError as error:
                value = {} if error.value is ... else {"value": error.value}
                send("error", {"message": error.message, "parameter": error.parameter, **value})
            except MemoryError:
                send("failure", MemoryError.__name__)
            except BaseException as error:  # a panic of the tokenizers library is no Exception
                send("failure", one_line(error))
        code = 0
    finally:
        os._exit(code)


def _isolate(scratch: str, memory: int) -> None:
    """Let this process die of an alarm, print nothing, keep its files in one folder, and take so much more memory."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to both; the other kills this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    console.quiet, tempfile.tempdir = True, scratch
    try:
        import resource
    except ImportError:  # where there is none, the time alone is bounded
        return
    usage = psutil.Process().memory_info()
    for limit, used in ((resource.RLIMIT_AS, usage.vms), (resource.RLIMIT_DATA, getattr(usage, "data", usage.vms))):
        with suppress(ValueError, OSError):  # macOS has no such limits
            _, most = resource.getrlimit(limit)
            resource.setrlimit(limit, (used + memory if most < 0 else min(used + memory, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
