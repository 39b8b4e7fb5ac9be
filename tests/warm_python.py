"""A `python` that is warm: one process imports what stages and DVC import, and each program is a fork of it.

Importing torch and transformers takes four seconds; a stage's work in a tiny project takes a tenth of one. A test that
is about what processes do, killed ones and several at once among them, and not about how one starts, runs them by the
`python` of `warm_python`. That is a program of its own: it takes a script or `-m MODULE`, arguments, standard streams,
environment and folder; it passes signals on; it ends as the program ends; killed, it takes the program along. Whatever
else it is given goes to the real Python. Our own modules each program imports anew. What other libraries read of the
environment while they are imported, such as HF_HOME, is the server's.
"""

import atexit
import gc
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

# What our modules import only where they use it, and DVC.
PRELOADED = (
    "celery.app.amqp",
    "datasets.packaged_modules.json.json",
    "dvc.cli.parser",
    "dvc.repo.experiments.executor.local",
    "dvc.repo.experiments.queue.celery",
    "dvc.repo.reproduce",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "matplotlib.backends.backend_agg",
    "peft",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
)


SHIM = """#!{real} -IS
import sys
sys.path.insert(0, {here!r})
from warm_python import run_warm
run_warm({address!r}, {python!r}, [*{first}, *sys.argv[1:]])
"""


@contextmanager
def warm_python(environment: Mapping[str, str]) -> Iterator[Path]:
    """Start a server with these variables beside this process's; give the folder of its `python` and `dvc`."""
    with TemporaryDirectory() as name:  # whose path is short, as a socket's must be
        folder, address = Path(name) / "bin", str(Path(name) / "socket")
        folder.mkdir()
        for program, first in (("python", []), ("dvc", ["-m", "dvc"])):
            file, python = folder / program, str(folder / "python")
            here = str(Path(__file__).parent)
            file.write_text(SHIM.format(real=sys.executable, here=here, address=address, python=python, first=first))
            file.chmod(0o755)
        command, given = [sys.executable, "-u", __file__, address], os.environ | environment
        server = subprocess.Popen(command, env=given, stdin=subprocess.PIPE, start_new_session=True)
        try:
            while not os.path.exists(address):
                assert server.poll() is None, "the server of warm processes did not start"
                time.sleep(0.01)
            yield folder
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


# --- the program that is run as `python` -----------------------------------------------------------------


def run_warm(address: str, python: str, arguments: list[str]) -> NoReturn:
    """Have the server run a program with this process's streams, environment and folder, and end as it does.

    `python` is what the program takes for its `sys.executable`.
    """
    given = arguments
    if arguments[:1] == ["-u"]:  # as torchrun calls it; nothing is buffered here
        arguments = arguments[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
        os.execv(sys.executable, [sys.executable, *given])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        content = json.dumps({**request, "executable": python}).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        answers = connection.makefile()
        process = int(answers.readline())
        for forwarded in (signal.SIGINT, signal.SIGTERM):
            signal.signal(forwarded, lambda number, _: os.kill(process, number))
        code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# --- the server ------------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for every request and tell its process and its end; in a fork, give the request."""
    clients: dict[int, socket.socket | None] = {}
    ended, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        connections: dict[Any, int] = {client: process for process, client in clients.items() if client}
        ready = select.select([sys.stdin, listener, ended, *connections], [], [])[0]
        if sys.stdin in ready:  # whoever started this process has ended
            os.killpg(0, signal.SIGTERM)
        for client in connections.keys() & set(ready):  # it says nothing, so it was killed
            os.kill(connections[client], signal.SIGKILL)
            clients[connections[client]] = None
            client.close()
        if ended in ready:
            os.read(ended, 4096)
            while clients and (found := os.waitpid(-1, os.WNOHANG))[0]:
                if gone := clients.pop(found[0], None):
                    gone.sendall(f"{found[1]}\n".encode())
                    gone.close()
        if listener in ready:
            client = listener.accept()[0]
            length, streams, _, _ = socket.recv_fds(client, 8, 3)
            content = client.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for descriptor in (ended, end, listener.detach(), *streams):
                    os.close(descriptor)
                for other in (client, *connections):
                    other.close()
                return dict(json.loads(content))
            for stream in streams:
                os.close(stream)
            client.sendall(f"{process}\n".encode())
            clients[process] = client


def run(request: dict[str, Any]) -> NoReturn:
    """Run a program as Python runs it, and end as Python ends, but for taking all of its modules apart: 2 seconds."""
    arguments: list[str] = request["arguments"]
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["executable"]  # whose children are warm too
    code = 1
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], request["folder"]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare() -> None:
    """Let libraries remember what they work out, and have them do so for what every stage reads."""
    import pytest
    import yaml
    from remembered import remember, remember_task_index
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    patch = pytest.MonkeyPatch()
    remember(patch)
    remember_task_index(patch)
    yaml.safe_load((Path(__file__).parent.parent / "dvc.yaml").read_text(encoding="utf-8"))
    get_checkpoint_conversion_mapping("llama")  # of all models: hundreds of patterns
    inspect.getmodule(compile("0", "no module's", "eval"))  # looks into all of them, and keeps their files


def main() -> None:
    """Import everything, then serve at the address that the command line has."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(64)  # who comes early waits
        own = importlib.import_module("scaleot_core").__path__
        for name in (*(found.name for found in pkgutil.walk_packages(own, "scaleot_core.")), *PRELOADED):
            importlib.import_module(name)
        for name in [name for name in sys.modules if name.partition(".")[0] == "scaleot_core"]:
            del sys.modules[name]  # what it imports stays; itself each program imports, in its own environment
        prepare()
        gc.collect()
        gc.freeze()  # a fork that looks for garbage would copy all that was imported
        request = serve(listener)
    run(request)


if __name__ == "__main__":
    main()
