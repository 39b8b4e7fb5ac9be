"""Runs of the pipeline with some parameters changed, as DVC experiments that are made once and read back by name.

Each runs in a folder of its own (`dvc exp run --temp`), so that the project stays as it is, and takes from DVC's cache
all that the change doesn't touch. One that was stopped is run again; one that is there isn't. A long study keeps its
runs' figures in a CSV file too, which git has where DVC's cache is gone.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.errors import UserError
from scaleot_core.files import fingerprint
from scaleot_core.params import Params, changed, checked, load_params
from scaleot_core.progress import progress, say
from scaleot_core.report import read_csv, write_csv

POLL_SECONDS = 20.0
DVC_SECONDS = 120.0  # more than its own commands ever take, those that run an experiment apart
# In what `dvc queue status` says:
TASK = re.compile(r"^([0-9a-f]{7})\s+(\S+)\s.*\s(Queued|Running|Failed|Success)\s*$", re.MULTILINE)
WAITING = {"Queued", "Running"}
NO_WORKER = "Worker status: 0 active, 0 idle"
PATIENCE = 10  # times that DVC sees no worker, or says nothing, before we believe it: one may be busy
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


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {' '.join(done.stderr.split())}")
    return done.stdout


def finished() -> dict[str, str]:
    """Experiments of the commit at hand that ended well, by name: DVC has a git reference to the commit of each."""
    head = _git("rev-parse", "HEAD").strip()
    listed = _git("for-each-ref", "--format=%(refname:lstrip=4) %(objectname)", f"refs/exps/{head[:2]}/{head[2:]}")
    return dict(line.split(" ") for line in listed.splitlines())


def _set(changes: Changes) -> list[str]:
    return [f"--set-param={key}={json.dumps(value)}" for key, value in changes.items()]


def _row(name: str, commit: str, changes: Changes) -> Row:
    """An experiment's row; UserError where it was made with other parameters than these changes give now."""
    made = flat(checked(Params, yaml.safe_load(_git("show", f"{commit}:params.yaml"))).model_dump())
    for key, value in flat(changed(load_params(), dict(changes)).model_dump()).items():
        if key not in ANYHOW and made.get(key) != value:
            raise UserError(
                f"experiment {name}: it is there with {key} = {made.get(key)!r}, and would now have {value!r}; "
                f"commit params.yaml, or `dvc exp remove {name}`"
            )
    row = {"commit": commit, **made}
    return row | flat(read_metrics(row))


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
    return _row(name, found[name], changes)


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


def _ended(todo: dict[str, Changes]) -> Iterator[tuple[str, Row]]:
    """Take out of `todo` what is done, each with its row."""
    done = finished()
    for name in [name for name in todo if name in done]:
        yield name, _row(name, done[name], todo.pop(name))


def run_all(wanted: Mapping[str, Changes], label: str, targets: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Names and rows of many experiments, each as it ends: what isn't there goes into DVC's queue, which as many work
    off as fit.

    `targets` are what each runs, as `dvc repro` takes them; without any the whole pipeline.
    Interrupted, what runs ends and the queue stays: the same command goes on. UserError names one that failed.
    """
    for changes in wanted.values():
        changed(load_params(), dict(changes))  # what is wrong is said before the first one runs
    todo = dict(wanted)
    yield from _ended(todo)
    if not todo:
        return
    waiting, jobs = _waiting(), workers()
    tasks = TASK.findall(_dvc("queue", "status"))
    others = {task for task, name, state in tasks if state not in WAITING or name not in waiting}
    shared = {"threads": len(os.sched_getaffinity(0)) // jobs} if jobs > 1 else {}
    for name in [name for name in todo if name not in waiting]:
        _dvc("exp", "run", "--queue", f"--name={name}", *_set({**todo[name], **shared}), *targets)
    _dvc("queue", "start", f"--jobs={jobs}")
    say(f"{label}: {jobs} at once; `dvc queue logs NAME` shows one")
    try:
        with progress(label, len(wanted), len(wanted) - len(todo)) as tick:
            for ended in _watched(todo, others):
                tick()
                yield ended
    except KeyboardInterrupt:
        _dvc("queue", "stop")
        raise


def _waiting() -> set[str]:
    """Names of the experiments of the commit at hand that are in DVC's queue, or run."""
    import dvc.api

    return {row["Experiment"] for row in dvc.api.exp_show() if row.get("State") in WAITING}


def _watched(todo: dict[str, Changes], others: set[str]) -> Iterator[tuple[str, Row]]:
    """What DVC's workers end of `todo`, as they do; UserError for one that failed, but for `others` among its tasks."""
    unseen = 0  # times in a row that no worker was
    while todo:
        time.sleep(POLL_SECONDS)
        yield from _ended(todo)
        try:
            status = _dvc("queue", "status")
        except UserError:
            status = NO_WORKER  # DVC trips at times over a run that ends while it looks
        for task, name, state in TASK.findall(status):
            if name in todo and state == "Failed" and task not in others:
                raise UserError(
                    f"experiment {name}: it failed; `dvc queue logs {name}` says why; mend it, then run again: what is "
                    "done is kept"
                )
        unseen = unseen + 1 if NO_WORKER in status else 0
        if todo and unseen == PATIENCE:
            raise UserError(
                f"experiment {next(iter(todo))}: no worker of DVC's is left for it; `dvc queue kill` what `dvc queue "
                "status` has as running, then run again: what is done is kept"
            )


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


def _dvc(*arguments: str) -> str:
    """What one of DVC's short commands says, into a file: a worker that it starts would keep a pipe open to its end."""
    with tempfile.TemporaryFile("w+") as said:
        try:
            code = subprocess.run(["dvc", *arguments], stdout=said, stderr=said, timeout=DVC_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = None
        said.seek(0)
        text = said.read()
    if code != 0:
        ending = "no end" if code is None else f"exit code {code}"
        raise UserError(f"dvc {arguments[0]} {arguments[1]}: {ending}; {' '.join(text.split())[-300:]}")
    return text


def read_metrics(row: Row, name: str = "metrics.json") -> Any:
    """All of an experiment's metrics.json, or of another file of metrics that git has."""
    return json.loads(_git("show", f"{row['commit']}:{name}"))
