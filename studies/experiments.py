"""Run the pipeline with some parameters changed, as DVC experiments that are made once and read back by name.

Each runs in a folder of its own (`dvc exp run --temp`), so that the project stays as it is, and takes from DVC's cache
all that the change doesn't touch. One that was stopped is run again; one that is there isn't: git's references say
which are done, DVC's queue which failed. A long study keeps its runs' figures in a CSV file too, which git has where
DVC's cache is gone.

Paths and git's files are taken from the project's folder, which may be a part of a repository.
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

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import fingerprint, read_csv, write_csv
from scaleot_core.common.progress import progress, say
from scaleot_core.common.validation import validate_block
from scaleot_core.params import Params, changed, load_params
from studies import dvc_queue

POLL_SECONDS = float(os.environ.get("STUDIES_POLL_SECONDS", "5"))  # between two looks at DVC's queue
IDLE_SECONDS = 60.0  # without a worker before it is believed that none comes; meanwhile workers are started anew
NEUTRAL_PARAMS = {"device", "threads", "launch", "checkpoint_seconds"}  # parameters that no figure hangs on
DRAWING = Path("scaleot_core/reporting/figures.py")  # and code that none hangs on

PIPELINE = ("dvc.yaml",)  # all of its stages, as a target
EMULATOR_STAGES = ("layer_importance", "train_harmonizers", "compress")  # the stages that ScaleOT's emulator takes

Row = dict[str, Any]
"""Metrics and parameters of one experiment, by names such as `tasks.piqa.gap.acc` and `dlr.steps`."""
Changes = Mapping[str, Any]
"""To params.yaml, by names such as `dlr.steps`."""
Figures = Mapping[str, float | None]
"""What a study takes from one run, by the name of its column; None where a run has none."""


def experiment_name(*parts: object) -> str:
    """Make a name that DVC takes: words and numbers joined by hyphens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(map(str, parts))).strip("-")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {' '.join(done.stderr.split())}")
    return done.stdout


def _commit(revision: str = "HEAD") -> str:
    return _git("rev-parse", revision).strip()


def finished(base: str) -> dict[str, str]:
    """Find the commits of the experiments of commit `base` that ended well, by name: DVC has a reference to each."""
    listed = _git("for-each-ref", "--format=%(refname:lstrip=4) %(objectname)", f"refs/exps/{base[:2]}/{base[2:]}")
    return dict(line.split(" ") for line in listed.splitlines())


def _set(changes: Changes) -> list[str]:
    return [f"--set-param={key}={json.dumps(value)}" for key, value in changes.items()]


def _expected(changes: Changes) -> dict[str, Any]:
    """Read all parameters with these changes, flat; UserError where one is wrong."""
    return flatten(changed(load_params(), dict(changes)).model_dump())


def _row(name: str, commit: str, expected: Mapping[str, Any], targets: Sequence[str]) -> Row:
    """Read an experiment's row; UserError where it was made with other parameters or another code of its targets."""
    made = flatten(validate_block(Params, yaml.safe_load(_file(commit, "params.yaml"))).model_dump())
    for key, value in expected.items():
        if key not in NEUTRAL_PARAMS and made.get(key) != value:
            raise UserError(
                f"experiment {name}: it is there with {key} = {made.get(key)!r}, and would now have {value!r}; "
                f"commit params.yaml, or `dvc exp remove {name}`"
            )
    if edited := _git("diff", "--name-only", "--relative", commit, "--", *map(str, code(*targets))).splitlines():
        raise UserError(
            f"experiment {name}: it is there, made before {edited[0]} was changed; commit that, or "
            f"`dvc exp remove {name}`"
        )
    row = {"commit": commit, **made}
    return row | flatten(read_metrics(row))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested parameters as `dlr.steps`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def run(name: str, changes: Changes) -> Row:
    """Run experiment `name` with these parameters if it isn't there, and read its row; UserError where it fails."""
    expected, base = _expected(changes), _commit()
    if name not in finished(base):
        dvc_queue.check_path()
        say(f"experiment {name}", style="bold")
        if subprocess.run(["dvc", "exp", "run", "--temp", f"--name={name}", *_set(changes)]).returncode:
            raise UserError(f"experiment {name}: it failed; see above, mend it, then run again: what is done is kept")
    return _row(name, finished(base)[name], expected, PIPELINE)


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` arguments as changes to params.yaml; UserError for one that is none."""
    changes = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r}: a setting is KEY=VALUE, such as alpha=0.5")
        changes[key] = yaml.safe_load(value)
    return changes


def workers() -> int:
    """Count the experiments that this machine can run at once: one for a CPU and eight GiB; on a GPU one.

    Layers as small as a laptop's gain little from a second thread: two experiments of one thread each end sooner than
    two of two threads, one after the other.
    """
    import psutil
    import torch

    from scaleot_core.common.runtime import cpu_count

    if load_params().device != "cpu" and torch.cuda.is_available():
        return 1
    return max(1, min(cpu_count(), psutil.virtual_memory().total // (8 * 2**30)))


def run_all(wanted: Mapping[str, Changes], label: str, targets: Sequence[str] = PIPELINE) -> Iterator[tuple[str, Row]]:
    """Yield (name, row) of many experiments, each as it ends. Missing ones are queued and run as many at once as fit.

    `targets` are what each runs, as `dvc repro` takes them. Whoever stops watching doesn't stop the queue, and watches
    it again with the same command.

    Raises:
        UserError: an experiment failed, or DVC has no worker for it; it is named.
    """
    todo, base = {name: _expected(changes) for name, changes in wanted.items()}, _commit()

    def ended() -> Iterator[tuple[str, Row]]:
        done = finished(base)
        for name in [name for name in todo if name in done]:
            yield name, _row(name, done[name], todo.pop(name), targets)

    yield from ended()
    if not todo:
        return
    dvc_queue.check_path()
    jobs = min(workers(), len(todo))
    others = _queue({name: wanted[name] for name in todo}, base, label, targets, jobs)
    seen = time.monotonic()  # when a worker lived last
    with progress(label, len(wanted), len(wanted) - len(todo)) as tick:
        while True:
            for each in ended():
                tick()
                yield each
            if not todo:
                return
            time.sleep(POLL_SECONDS)
            tasks, trouble = [], ""
            try:
                tasks = dvc_queue.tasks()
            except Exception as error:  # DVC trips at times over a run that ends while it looks
                trouble = f" ({one_line(error)})"
            for task in tasks:
                if task.name in todo and task.state == "failed" and task.revision not in others:
                    raise UserError(
                        f"experiment {task.name}: it failed; `dvc queue logs {task.name}` says why; mend it, then run "
                        "again: what is done is kept"
                    )
            if dvc_queue.has_worker():
                seen = time.monotonic()
            elif any(task.state == "waiting" for task in tasks):  # the workers ended: an earlier stop reached them late
                _dvc("queue", "start", f"--jobs={jobs}")
            if time.monotonic() - seen > IDLE_SECONDS:
                raise UserError(
                    f"experiment {next(iter(todo))}: DVC has no worker for it{trouble}; `dvc queue kill` what "
                    "`dvc queue status` has as running though nothing runs, then run again: what is done is kept"
                )


def _queue(missing: Mapping[str, Changes], base: str, label: str, targets: Sequence[str], jobs: int) -> set[str]:
    """Queue what is missing and not in DVC's queue yet, and start `jobs` workers; return the tasks that aren't ours."""
    from scaleot_core.common.runtime import cpu_count

    tasks = dvc_queue.tasks()
    waiting = [task for task in tasks if task.state != "failed"]
    ours = {task.revision: task.name for task in waiting if task.base == base}
    if first := [task.name for task in waiting if task.revision not in ours]:
        say(f"{label}: in DVC's queue {first[0]} goes first, of another commit; `dvc queue remove --queued` empties it")
    shared = {"threads": cpu_count() // jobs} if jobs > 1 else {}
    for name in [name for name in missing if name not in ours.values()]:
        _dvc("exp", "run", "--queue", f"--name={name}", *_set({**missing[name], **shared}), *targets)
    _dvc("queue", "start", f"--jobs={jobs}")
    say(f"{label}: {jobs} at once, and on if this is stopped, until `dvc queue stop`; `dvc queue logs NAME` shows one")
    return {task.revision for task in tasks} - ours.keys()


def code(*targets: str) -> list[Path]:
    """List the project's own files that figures of DVC's targets, a file or a stage of it, depend on."""
    stages: list[dict[str, Any]] = []
    for target in targets:
        path, _, stage = target.partition(":")
        there = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["stages"]
        stages += [there[stage]] if stage else there.values()
    own = {Path(dep) for stage in stages for dep in stage["deps"] if not dep.startswith(("artifacts/", "costs"))}
    files = [file for dep in sorted(own) for file in (sorted(dep.rglob("*")) if dep.is_dir() else [dep])]
    return [file for file in files if file.suffix in {".py", ".yaml", ".lock"} and file != DRAWING]


def cached_figures(
    path: Path,
    columns: Collection[str],
    wanted: Mapping[str, Changes],
    make: Callable[[Mapping[str, Changes]], Iterable[tuple[str, Figures]]],
    *targets: str,
) -> dict[str, Figures]:
    """Return every wanted run's figures by name: from the CSV file at `path`, or made now and written there at once.

    A line there counts for a run of the same parameters and the same `code` of these targets, whatever its name, if it
    has all columns. Lines of other runs stay. UserError where the code is changed meanwhile.
    """
    lines = [line for line in (read_csv(path) if path.exists() else []) if line.keys() >= {"run", *columns, "made of"}]
    known = {line["made of"]: line for line in lines}
    source, made_of, found = fingerprint(*code(*targets)), dict[str, str](), dict[str, Figures]()
    for name, changes in wanted.items():
        params = changed(load_params(), dict(changes)).model_dump(exclude=NEUTRAL_PARAMS)
        made_of[name] = f"sha256-{fingerprint(params, source)}"
        if line := known.get(made_of[name]):
            found[name] = {column: None if line[column] == "" else line[column] for column in columns}
    rest = [line for line in lines if line["run"] not in wanted and line["made of"] not in made_of.values()]
    for name, figures in make({name: changes for name, changes in wanted.items() if name not in found}):
        if fingerprint(*code(*targets)) != source:
            raise UserError(f"{path}: the code was changed while {name} was made; commit it and run again, or undo it")
        values = {column: figures[column] for column in columns}
        found[name] = {column: None if value is None else float(value) for column, value in values.items()}
        there = [{"run": name, **found[name], "made of": made_of[name]} for name in wanted if name in found]
        write_csv(path, [*there, *rest], ["run", *columns, "made of"])
    return {name: found[name] for name in wanted}


def _dvc(*arguments: str) -> None:
    """Run one of DVC's commands; UserError has the end of what it said where it fails.

    It says it into a file: a worker that it starts would keep a pipe open until the worker's end.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        exit_code = subprocess.run(["dvc", *arguments], stdout=said, stderr=said).returncode
        said.seek(0)
        text = " ".join(said.read().split())
    if exit_code:
        raise UserError(f"dvc {arguments[0]} {arguments[1]}: exit code {exit_code}; {text[-300:]}")


def read_metrics(row: Row, name: str = "metrics.json") -> Any:
    """Read all of an experiment's metrics.json, or of another file of metrics that git has."""
    return json.loads(_file(row["commit"], name))


def _file(commit: str, name: str) -> str:
    """Read a file of the project as it is in a commit; the project may be a folder of the repository."""
    return _git("show", f"{commit}:./{name}")
