"""Runs of the pipeline with some parameters changed, as DVC experiments that are made once and read back by name.

Each runs in a folder of its own (`dvc exp run --temp`), so that the project stays as it is, and takes from DVC's cache
all that the change doesn't touch. One that was stopped is run again; one that is there isn't.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from scaleot_core.errors import UserError
from scaleot_core.params import changed, load_params
from scaleot_core.progress import progress, say

WAITING = {"Queued", "Running"}
POLL_SECONDS = 10.0
ANYHOW = {"device", "threads", "launch", "checkpoint_seconds"}  # parameters that no figure hangs on

Row = dict[str, Any]
"""Metrics and parameters of one experiment, by names such as `tasks.piqa.gap.acc` and `dlr.steps`."""


def experiment_name(*parts: object) -> str:
    """A name that DVC takes: words and numbers joined by hyphens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(map(str, parts))).strip("-")


def _rows() -> list[Row]:
    """All experiments of the commit at hand, those that wait, run or failed too."""
    import dvc.api

    return [row for row in dvc.api.exp_show() if row["Experiment"]]


def _sorted() -> tuple[dict[str, Row], set[str]]:
    """Experiments of the commit at hand: those that ended well, by name, and the names of those that wait or run."""
    rows = _rows()
    done = {row["Experiment"]: row for row in rows if row.get("State") not in {"Failed", *WAITING}}
    return done, {row["Experiment"] for row in rows if row.get("State") in WAITING}


def finished() -> dict[str, Row]:
    """Experiments of the commit at hand that ended well, by name."""
    return _sorted()[0]


def _set(changes: Mapping[str, Any]) -> list[str]:
    return [f"--set-param={key}={json.dumps(value)}" for key, value in changes.items()]


def _check(name: str, row: Row, changes: Mapping[str, Any]) -> Row:
    """A row that is there; UserError where it was made with other parameters than these changes give now."""
    expected = flat(changed(load_params(), dict(changes)).model_dump())
    for key, value in expected.items():
        shown = str(value) if isinstance(value, bool) else value  # as DVC's rows have it
        if key in row and isinstance(shown, int | float | str) and key not in ANYHOW and row[key] != shown:
            raise UserError(
                f"experiment {name}: it is there with {key} = {row[key]!r}, and would now have {value!r}; "
                f"commit params.yaml, or `dvc exp remove {name}`"
            )
    return row


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters by names such as `dlr.steps`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def run(name: str, changes: Mapping[str, Any]) -> Row:
    """The row of experiment `name`, run now with these parameters if it isn't there; UserError where a run fails."""
    found = finished()
    if name not in found:
        say(f"experiment {name}", style="bold")
        if subprocess.run(["dvc", "exp", "run", "--temp", f"--name={name}", *_set(changes)]).returncode:
            raise UserError(f"experiment {name}: it failed; see above, mend it, then run again: what is done is kept")
        found = finished()
    return _check(name, found[name], changes)


def settings(arguments: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` arguments as changes to params.yaml; UserError for one that is none."""
    changes = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r}: a setting is KEY=VALUE, such as alpha=0.5")
        changes[key] = yaml.safe_load(value)
    return changes


def workers() -> int:
    """How many experiments this machine runs at once: one for every four cores and eight GiB of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)) // 4, int(memory // 8)))


def run_all(wanted: Mapping[str, Mapping[str, Any]], label: str, targets: Sequence[str] = ()) -> dict[str, Row]:
    """Rows of many experiments, by name: what isn't there is put into DVC's queue, which as many work off as fit.

    `targets` are what each runs, as `dvc repro` takes them; without any the whole pipeline.
    Interrupted, what runs ends and the queue stays: the same command goes on. UserError names one that failed.
    """
    done, waiting = _sorted()
    jobs = workers()
    shared = {"threads": len(os.sched_getaffinity(0)) // jobs} if jobs > 1 else {}
    for name in wanted.keys() - done.keys() - waiting:
        _dvc("exp", "run", "--queue", f"--name={name}", *_set({**wanted[name], **shared}), *targets)
    if wanted.keys() <= done.keys():
        return {name: _check(name, done[name], changes) for name, changes in wanted.items()}
    _dvc("queue", "start", f"--jobs={jobs}")
    say(f"{label}: {jobs} at once; `dvc queue logs NAME` shows one")
    try:
        with progress(label, len(wanted), len(wanted.keys() & done.keys())) as tick:
            while not wanted.keys() <= done.keys():
                time.sleep(POLL_SECONDS)
                before = done
                done, waiting = _sorted()
                for _ in (done.keys() - before.keys()) & wanted.keys():
                    tick()
                if failed := sorted(wanted.keys() - done.keys() - waiting):
                    raise UserError(
                        f"experiment {failed[0]}: it failed; `dvc queue logs {failed[0]}` says why; mend it, then run "
                        "again: what is done is kept"
                    )
    except KeyboardInterrupt:
        _dvc("queue", "stop")
        raise
    return {name: _check(name, done[name], changes) for name, changes in wanted.items()}


def _dvc(*arguments: str) -> None:
    done = subprocess.run(["dvc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc {arguments[0]} {arguments[1]}: {' '.join((done.stdout + done.stderr).split())[-300:]}")


def read_metrics(row: Row, name: str = "metrics.json") -> Any:
    """All of an experiment's metrics.json, or of another file of metrics: a row has its numbers alone."""
    import dvc.api

    return json.loads(dvc.api.read(name, rev=row["rev"]))
