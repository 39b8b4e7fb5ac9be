"""Run the pipeline with some parameters changed, as DVC experiments that are run once and read back by name.

Each runs in a folder of its own (`dvc exp run --temp`), so that the project stays as it is, and takes from DVC's cache
all that the change doesn't touch. As many run at once as the machine has room for. An experiment whose parameters, code
and data are the same is not run again; one that was interrupted goes on from the last checkpoint. A long study keeps
its figures in a CSV file too, which git has where DVC's cache is gone.

Paths and git's files are taken from the project's folder, which may be a part of a repository.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import fingerprint, read_csv, write_csv
from scaleot_core.common.progress import progress, say
from scaleot_core.params import load_params
from studies import columns as figures_code
from studies.keys import PIPELINE, Changes, run_keys

LOGS = Path(".scaleot/experiments")  # the output of each experiment
LOCKED, LOCK_TRIES, LOCK_SECONDS = "Unable to acquire lock", 60, 2.0  # DVC's words; a lock is held for a moment
GRACE_SECONDS = 20.0  # for an interrupted stage to end by itself

Figures = Mapping[str, float | None]
"""What a study takes from one run, by the name of its column; None where a run has none."""


@dataclass(frozen=True)
class Run:
    """A finished experiment."""

    commit: str

    def read(self, name: str) -> Any:
        """Read a JSON file that git has of it, such as `attack.json`."""
        return json.loads(_git("show", f"{self.commit}:./{name}"))

    @property
    def metrics(self) -> dict[str, Any]:
        """All of its metrics.json."""
        return self.read("metrics.json")  # type: ignore[no-any-return]

    def write(self, path: str, folder: Path) -> None:
        """Write a file or folder of it, as `artifacts/emulator`, below `folder` at the same path."""
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if _git("ls-tree", self.commit, f"./{path}"):
            target.write_text(_git("show", f"{self.commit}:./{path}"), encoding="utf-8")
        else:  # DVC has it
            top, prefix = (_git("rev-parse", word).strip() for word in ("--show-toplevel", "--show-prefix"))
            _call("dvc", "get", "--quiet", top, prefix + path, f"--rev={self.commit}", f"--out={target}")


def experiment_name(*parts: object) -> str:
    """Make a name that DVC takes: words and numbers joined by hyphens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(map(str, parts))).strip("-")


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` arguments as changes to params.yaml; UserError for any other."""
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


def run_all(
    experiments: Mapping[str, Changes],
    label: str,
    targets: Sequence[str] = PIPELINE,
    ended: Callable[[str, Run], None] = lambda name, run: None,
) -> dict[str, Run]:
    """Run experiments, each its changes by its name, and call `ended` with each once it is there; return all.

    `targets` are what each runs, as `dvc repro` takes them. However this ends, no experiment goes on after it.

    Raises:
        UserError: a parameter is wrong, or an experiment failed; it is named.
    """
    from scaleot_core.common.runtime import cpu_count

    keys, base, runs = run_keys(experiments, *targets), _git("rev-parse", "HEAD").strip(), dict[str, Run]()
    for name, (commit, key) in _finished(base).items():
        if keys.get(name) == key:
            runs[name] = Run(commit)
            ended(name, runs[name])
        elif name in keys:
            say(f"experiment {name}: its parameters, code or data have changed; it is run anew")
            _git("update-ref", "-d", f"refs/exps/{base[:2]}/{base[2:]}/{name}")
    if not (missing := [name for name in experiments if name not in runs]):
        return runs
    _check_path()
    jobs = min(workers(), len(missing))
    share = {"threads": cpu_count() // jobs} if jobs > 1 else {}
    pool = _Pool(jobs)
    with progress(label, len(experiments), len(runs)) as tick, pool.threads:
        try:
            futures = {
                pool.threads.submit(pool.run, name, keys[name], {**experiments[name], **share}, targets): name
                for name in missing
            }
            for future in as_completed(futures):
                future.result()
                name = futures[future]
                runs[name] = Run(_finished(base)[name][0])
                ended(name, runs[name])
                tick()
        finally:
            pool.stop()
    return {name: runs[name] for name in experiments}


class _Pool:
    """Processes of DVC, so many at once, which all end when the pool is stopped."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.threads = jobs, ThreadPoolExecutor(jobs)
        self.lock, self.stopped, self.running = threading.Lock(), False, set[subprocess.Popen[str]]()

    def run(self, name: str, key: str, changes: Changes, targets: Sequence[str]) -> None:
        """Run one experiment, which carries its key as its message; UserError where it fails."""
        settings = [f"--set-param={parameter}={json.dumps(value)}" for parameter, value in changes.items()]
        command = ["dvc", "exp", "run", "--temp", f"--name={name}", f"--message={key}", *settings, *targets]
        log = LOGS / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"experiment {name}{f', its output in {log}' * (self.jobs > 1)}", style="bold")
        for _ in range(LOCK_TRIES):
            if self._run(command, log) == 0 or self.stopped:
                return
            if LOCKED not in log.read_text(encoding="utf-8"):
                break
            time.sleep(LOCK_SECONDS)
        raise UserError(f"experiment {name}: it failed; {log} says why; mend it, then run again: what is done is kept")

    def _run(self, command: list[str], log: Path) -> int:
        """Run a command with its output in `log`, and, if it is the only one, on the terminal; return its exit code."""
        with self.lock:
            if self.stopped:
                return 1
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a signal reaches DVC and its stage, and only from us
                encoding="utf-8",
                errors="replace",
            )
            self.running.add(process)
        with log.open("w", encoding="utf-8") as stream:
            for line in process.stdout or ():
                stream.write(line)
                stream.flush()
                if self.jobs == 1:
                    say(line.rstrip())
        return process.wait()

    def stop(self) -> None:
        """Start no more, and end those that run: by an interruption, which tidies up, else by SIGTERM."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.stopped = True
        for number in (signal.SIGINT, signal.SIGTERM):
            for process in self.running:
                if process.poll() is None:
                    os.killpg(process.pid, number)
            limit = time.monotonic() + GRACE_SECONDS
            while any(process.poll() is None for process in self.running) and time.monotonic() < limit:
                time.sleep(0.1)


def _finished(base: str) -> dict[str, tuple[str, str]]:
    """Return commit and key of the finished experiments of commit `base`, by name: git has a reference to each."""
    form = "%(refname:lstrip=4) %(objectname) %(contents:subject)"
    lines = _git("for-each-ref", f"--format={form}", f"refs/exps/{base[:2]}/{base[2:]}").splitlines()
    return {name: (commit, key) for name, commit, key in (line.split(" ", 2) for line in lines)}


def cached_figures(
    path: Path,
    experiments: Mapping[str, Changes],
    measure: Callable[[str, Run], Figures],
    label: str,
    targets: Sequence[str] = PIPELINE,
) -> dict[str, Figures]:
    """Return the figures of every experiment by name: from the CSV file at `path`, or measured now and added there.

    A row there counts for an experiment of the same key (`run_keys`), whatever its name, if the code that reads figures
    is the same too. Rows of other experiments stay.

    Raises:
        UserError: an experiment failed, or code or data were changed while it ran.
    """
    keys = _row_keys(experiments, targets)
    stored = read_csv(path) if path.exists() else []
    by_key = {row["made of"]: row for row in stored}
    rows: dict[str, dict[str, Any]] = {
        name: {**by_key[key], "run": name} for name, key in keys.items() if key in by_key
    }
    others = [row for row in stored if row["run"] not in keys and row["made of"] not in keys.values()]

    def add(name: str, run: Run) -> None:
        figures = {column: None if figure is None else float(figure) for column, figure in measure(name, run).items()}
        rows[name] = {"run": name, **figures, "made of": keys[name]}
        if _row_keys({name: experiments[name]}, targets) != {name: keys[name]}:
            raise UserError(f"{path}: code or data were changed while {name} ran; run again, or undo it")
        ordered = [*(rows[name] for name in keys if name in rows), *others]
        columns = dict.fromkeys(column for row in ordered for column in row if column != "made of")
        write_csv(path, ordered, [*columns, "made of"])

    run_all({name: experiments[name] for name in keys if name not in rows}, label, targets, add)
    text = {"run", "made of"}
    return {
        name: {column: None if value == "" else value for column, value in rows[name].items() if column not in text}
        for name in experiments
    }


def _row_keys(experiments: Mapping[str, Changes], targets: Sequence[str]) -> dict[str, str]:
    reading = Path(figures_code.__file__)
    return {name: f"sha256-{fingerprint(key, reading)}" for name, key in run_keys(experiments, *targets).items()}


def _git(*arguments: str) -> str:
    return _call("git", *arguments)


def _call(*command: str) -> str:
    """Run a command and return its output; UserError has its last words where it fails."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


def _check_path() -> None:
    """Refuse a project whose cache DVC can't name in the folders that it runs experiments in.

    It writes the cache's path there as ASCII, also by default, where the cache is in the project.
    """
    if Path.cwd().as_posix().isascii():
        return
    cache = _call("dvc", "cache", "dir").strip()
    if not cache.isascii():
        raise UserError(
            f"{cache}: DVC can't run experiments beside the project where its cache's path has letters other than "
            "ASCII; `dvc cache dir --local /another/path`, or move the project"
        )
