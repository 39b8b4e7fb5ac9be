"""Read DVC's experiment queue as data, which no command of DVC prints.

A worker moves beside us what is read here: any look can fail, and the next one will not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scaleot_core.common.errors import UserError, one_line


class Task(NamedTuple):
    """One experiment in the queue: its commit in DVC's stash, its name, the commit it changes, and where it stands."""

    revision: str
    name: str | None
    base: str
    state: Literal["waiting", "failed"]


def tasks() -> list[Task]:
    """List the experiments that wait or run, and those that failed; UserError where DVC can't tell."""
    with _repo() as repo:
        queue = repo.experiments.celery_queue
        waiting = [*queue.iter_active(), *queue.iter_queued()]
        failed = [done.entry for done in queue.iter_failed()]
    return [
        *(Task(entry.stash_rev, entry.name, entry.baseline_rev, "waiting") for entry in waiting),
        *(Task(entry.stash_rev, entry.name, entry.baseline_rev, "failed") for entry in failed),
    ]


def has_worker() -> bool:
    """Ask whether any worker of the queue answers, busy or idle, which takes a second; UserError as above."""
    with _repo() as repo:
        return bool(repo.experiments.celery_queue.worker_status())


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
