"""Runs of the pipeline with some parameters changed, as DVC experiments that are made once and read back by name.

Each runs in a folder of its own (`dvc exp run --temp`), so that the project stays as it is, and takes from DVC's cache
all that the change doesn't touch. One that was stopped is run again; one that is there isn't. A long study keeps its
runs' figures in a CSV file too, which git has where DVC's cache is gone.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.errors import UserError
from scaleot_core.files import fingerprint
from scaleot_core.params import changed, load_params
from scaleot_core.progress import progress, say
from scaleot_core.report import read_csv, write_csv

WAITING = {"Queued", "Running"}
POLL_SECONDS = 10.0
ANYHOW = {"device", "threads", "launch", "checkpoint_seconds"}  # parameters that no figure hangs on
DRAWING = Path("scaleot_core/pictures.py")  # and code that none hangs on

PREPARING = ("layer_importance", "train_harmonizers", "compress")  # the stages that ScaleOT's emulator takes

Row = dict[str, Any]
"""Metrics and parameters of one experiment, by names such as `tasks.piqa.gap.acc` and `dlr.steps`."""
Changes = Mapping[str, Any]
"""To params.yaml, by names such as `dlr.steps`."""
Figures = Mapping[str, float | None]
"""What a study takes from one run, by the name of its column; None where a run has none."""


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


def _set(changes: Changes) -> list[str]:
    return [f"--set-param={key}={json.dumps(value)}" for key, value in changes.items()]


def _check(name: str, row: Row, changes: Changes) -> Row:
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


def run(name: str, changes: Changes) -> Row:
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


def _ended(todo: dict[str, Changes], done: Mapping[str, Row]) -> Iterator[tuple[str, Row]]:
    """Take out of `todo` what is done, each with its row."""
    for name in [name for name in todo if name in done]:
        yield name, _check(name, done[name], todo.pop(name))


def run_all(wanted: Mapping[str, Changes], label: str, targets: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Names and rows of many experiments, each as it ends: what isn't there goes into DVC's queue, which as many work
    off as fit.

    `targets` are what each runs, as `dvc repro` takes them; without any the whole pipeline.
    Interrupted, what runs ends and the queue stays: the same command goes on. UserError names one that failed.
    """
    done, waiting = _sorted()
    todo = dict(wanted)
    yield from _ended(todo, done)
    if not todo:
        return
    jobs = workers()
    shared = {"threads": len(os.sched_getaffinity(0)) // jobs} if jobs > 1 else {}
    for name in [name for name in todo if name not in waiting]:
        _dvc("exp", "run", "--queue", f"--name={name}", *_set({**todo[name], **shared}), *targets)
    _dvc("queue", "start", f"--jobs={jobs}")
    say(f"{label}: {jobs} at once; `dvc queue logs NAME` shows one")
    try:
        with progress(label, len(wanted), len(wanted) - len(todo)) as tick:
            while todo:
                time.sleep(POLL_SECONDS)
                done, waiting = _sorted()
                for ended in _ended(todo, done):
                    tick()
                    yield ended
                if failed := sorted(todo.keys() - waiting):
                    raise UserError(
                        f"experiment {failed[0]}: it failed; `dvc queue logs {failed[0]}` says why; mend it, then run "
                        "again: what is done is kept"
                    )
    except KeyboardInterrupt:
        _dvc("queue", "stop")
        raise


def code(*targets: str) -> list[Path]:
    """The project's own files that figures of DVC's targets, a file or a stage of it, hang on."""
    stages: list[dict[str, Any]] = []
    for target in targets:
        path, _, stage = target.partition(":")
        there = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["stages"]
        stages += [there[stage]] if stage else there.values()
    own = {Path(dep) for stage in stages for dep in stage["deps"] if not dep.startswith(("artifacts/", "costs"))}
    own.discard(DRAWING)
    return [file for dep in sorted(own) for file in (sorted(dep.rglob("*.py")) if dep.is_dir() else [dep])]


def kept(
    path: Path,
    columns: Collection[str],
    wanted: Mapping[str, Changes],
    make: Callable[[Mapping[str, Changes]], Iterable[tuple[str, Figures]]],
    *targets: str,
) -> dict[str, Figures]:
    """Figures of every wanted run by its name: from the CSV file at `path`, or made now and written there as each ends.

    A line there counts for a run of the same parameters and the same `code` of these targets, whatever its name, if it
    has all columns.
    """
    known = {row.get("made of"): row for row in read_csv(path)} if path.exists() else {}
    source, made_of, found = fingerprint(*code(*targets)), dict[str, str](), dict[str, Figures]()
    for name, changes in wanted.items():
        params = changed(load_params(), dict(changes)).model_dump(exclude=ANYHOW)
        made_of[name] = f"sha256-{fingerprint(params, source)}"
        line = known.get(made_of[name], {})
        if line.keys() >= {*columns}:
            found[name] = {column: None if line[column] == "" else line[column] for column in columns}
    for name, figures in make({name: changes for name, changes in wanted.items() if name not in found}):
        values = {column: figures[column] for column in columns}
        found[name] = {column: None if value is None else float(value) for column, value in values.items()}
        there = [(name, found[name], made_of[name]) for name in wanted if name in found]
        write_csv(path, ["run", *columns, "made of"], ([name, *row.values(), of] for name, row, of in there))
    return {name: found[name] for name in wanted}


def _dvc(*arguments: str) -> None:
    done = subprocess.run(["dvc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc {arguments[0]} {arguments[1]}: {' '.join((done.stdout + done.stderr).split())[-300:]}")


def read_metrics(row: Row, name: str = "metrics.json") -> Any:
    """All of an experiment's metrics.json, or of another file of metrics: a row has its numbers alone."""
    import dvc.api

    return json.loads(dvc.api.read(name, rev=row["rev"]))
