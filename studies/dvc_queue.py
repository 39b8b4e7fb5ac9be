"""Read DVC's experiment queue as data, which no command of DVC prints.

A worker moves beside us what is read here: any look can fail, and the next one will not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scaleot_core.common.errors import UserError, one_line

State = Literal["running", "waiting", "failed"]


class Task(NamedTuple):
    """One experiment in the queue: its commit in DVC's stash, its name, the commit it changes, and where it stands."""

    revision: str
    name: str | None
    base: str
    state: State


def tasks() -> list[Task]:
    """List the experiments that wait or run, and those that failed; UserError where DVC can't tell."""
    with _repo() as repo:
        queue = repo.experiments.celery_queue
        found: dict[State, list[Any]] = {
            "running": list(queue.iter_active()),
            "waiting": list(queue.iter_queued()),
            "failed": [done.entry for done in queue.iter_failed()],
        }
    return [Task(entry.stash_rev, entry.name, entry.baseline_rev, state) for state in found for entry in found[state]]


def has_worker() -> bool:
    """Say whether a worker of this project's queue lives.

    It isn't asked: one that was told to stop, by an earlier `dvc queue stop` too, answers nobody but ends its run.
    """
    import psutil

    here = Path.cwd()
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, folder = process.info["cmdline"], process.info["cwd"]
        if command and folder and "queue-worker" in command and Path(folder) == here:
            return True
    return False


def check_path() -> None:
    """Refuse a project whose cache DVC can't name in the folders that it runs experiments in.

    It writes the cache's path there as ASCII, also by default, where the cache is in the project.
    """
    if Path.cwd().as_posix().isascii():
        return
    with _repo() as repo:
        cache = str(repo.cache.local_cache_dir)
    if not cache.isascii():
        raise UserError(
            f"{cache}: DVC can't run experiments beside the project where its cache's path has letters other than "
            "ASCII; `dvc cache dir --local /another/path`, or move the project"
        )


@contextmanager
def _repo() -> Iterator[Any]:
    """Open the DVC project in the current folder; UserError where there is none, or DVC fails."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise UserError(f"DVC can't read its project: {one_line(error)}") from None
