"""DVC's experiments, on a pipeline that takes no time: in every shape of a clone and its path, and several at once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT

from scaleot_core.common.errors import UserError
from studies import experiments

PIPELINE = """stages:
  measure:
    cmd: python stages/measure.py
    deps:
      - stages/measure.py
    params:
      - alpha
      - adapter_layers
    outs:
      - artifacts/made
    metrics:
      - metrics.json:
          cache: false
"""
MEASURE = """import json, os, sys, time
lines = open("params.yaml", encoding="utf-8").read().splitlines()
values = dict(line.partition("#")[0].split(":", 1) for line in lines if line[:1].isalpha())
print("cutting", flush=True)
assert int(values["adapter_layers"]) < 50, "too many"
time.sleep(600 if float(values["alpha"]) == 0.75 else 0)
os.makedirs("artifacts/made")
open("artifacts/made/alpha", "w").write(values["alpha"].strip())
json.dump({"alpha": float(values["alpha"])}, open("metrics.json", "w"))
"""

pytestmark = pytest.mark.timeout(900)  # DVC starts a process of several seconds for everything


def call(folder: Path, *command: str) -> None:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.com", "-c", "protocol.file.allow=always")
    command = ("git", *identity, *command[1:]) if command[0] == "git" else command
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def repository(top: Path, project: str = ".") -> Path:
    """Make a git repository with the project in a folder of it; return the project."""
    folder = top / project
    (folder / "stages").mkdir(parents=True)
    (folder / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (folder / "stages" / "measure.py").write_text(MEASURE, encoding="utf-8")
    (folder / "corpus.txt").write_text("text", encoding="utf-8")
    (folder / ".gitignore").write_text("/artifacts/\n/.scaleot/\ncorpus.txt\n", encoding="utf-8")
    shutil.copy(ROOT / "params.yaml", folder)
    call(top, "git", "init", "--quiet")
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=lambda at, names: set(names) - {"config", ".gitignore"})
    call(top, "git", "add", "--all")
    call(top, "git", "commit", "--quiet", "--message", "project")
    return folder


def plain(base: Path) -> Path:
    return repository(base / "plain")


def subfolder_with_spaces(base: Path) -> Path:
    return repository(base / "many things", "models/scale ot (x)")


def worktree(base: Path) -> Path:
    project = repository(base / "clone", "models/scaleot")
    call(base / "clone", "git", "worktree", "add", "--quiet", "-b", "other", str(base / "tree"))
    return base / "tree" / project.relative_to(base / "clone")


def submodule(base: Path) -> Path:
    repository(base / "module")
    (base / "super").mkdir()
    call(base / "super", "git", "init", "--quiet")
    call(base / "super", "git", "submodule", "--quiet", "add", str(base / "module"), "scaleot")
    return base / "super" / "scaleot"


def shallow_clone_behind_a_link(base: Path) -> Path:
    repository(base / "origin")
    call(base, "git", "clone", "--quiet", "--depth=1", (base / "origin").as_uri(), "shallow")
    (base / "link").symlink_to(base / "shallow")
    return base / "link"


def letters_outside_ascii(base: Path) -> Path:
    project = repository(base / "Gewässer ε")
    call(project, "dvc", "cache", "dir", "--local", str(base / "cache"))
    return project


Inside = Callable[[Callable[[Path], Path]], None]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inside:
    """Go into a project of a shape, with nothing of this machine's DVC."""
    for name in [name for name in os.environ if name.startswith("DVC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setattr(experiments, "workers", lambda: 2)
    return lambda shape: monkeypatch.chdir(shape(tmp_path))


def ran(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Name the experiments that were run since the last look."""
    lines = capsys.readouterr().err.splitlines()
    return sorted(line.split()[1].rstrip(",") for line in lines if line.startswith("experiment ") and ":" not in line)


@pytest.mark.parametrize(
    "shape",
    [subfolder_with_spaces, worktree, submodule, shallow_clone_behind_a_link, letters_outside_ascii],
    ids=lambda shape: shape.__name__,
)
def test_experiment_is_run_once_and_read_back_wherever_the_project_lies(
    inside: Inside, shape: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(shape)
    for names in (["half"], []):
        run = experiments.run_all({"half": {"alpha": 0.5}}, "test")["half"]
        assert run.metrics == {"alpha": 0.5} and ran(capsys) == names
    for path in ("params.yaml", "artifacts/made"):
        run.write(path, tmp_path / "copy")
    assert (tmp_path / "copy/artifacts/made/alpha").read_text() == "0.5"
    assert "alpha: 0.5 " in (tmp_path / "copy/params.yaml").read_text(encoding="utf-8")


def test_several_run_at_once_and_each_is_run_anew_only_for_other_code_parameters_or_data(
    inside: Inside, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(plain)
    changes = {"data.corpus": "corpus.txt"}
    names = {f"alpha-{i}": {**changes, "alpha": i / 10} for i in range(4)}
    ended: list[str] = []
    runs = experiments.run_all(names, "test", ended=lambda name, run: ended.append(name))
    assert [run.metrics["alpha"] for run in runs.values()] == [0.0, 0.1, 0.2, 0.3] and sorted(ended) == [*names]
    assert ran(capsys) == [*names]
    one = {"alpha-1": names["alpha-1"]}
    Path("corpus.txt").write_text("another text", encoding="utf-8")
    assert experiments.run_all(one, "test") and ran(capsys) == ["alpha-1"]
    with Path("stages/measure.py").open("a", encoding="utf-8") as stream:
        stream.write("# edited\n")
    assert experiments.run_all(one, "test") and ran(capsys) == ["alpha-1"]
    assert experiments.run_all({"alpha-1": changes}, "test")["alpha-1"].metrics == {"alpha": 0.25}
    assert ran(capsys) == ["alpha-1"]


def test_experiment_that_fails_is_named_and_what_is_finished_is_kept(
    inside: Inside, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside(subfolder_with_spaces)
    monkeypatch.setattr(experiments, "workers", lambda: 1)
    names = {"half": {"alpha": 0.5}, "too-many": {"adapter_layers": 99}}
    with pytest.raises(UserError, match=r"experiment too-many: it failed; \.scaleot/experiments/too-many\.log"):
        experiments.run_all(names, "test")
    assert "AssertionError: too many" in Path(".scaleot/experiments/too-many.log").read_text(encoding="utf-8")
    assert ran(capsys) == ["half", "too-many"]
    assert experiments.run_all({**names, "too-many": {"alpha": 0.1}}, "test")["half"].metrics == {"alpha": 0.5}
    assert ran(capsys) == ["too-many"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_the_runs_and_leaves_no_process(inside: Inside, number: signal.Signals) -> None:
    inside(plain)
    study = "from scaleot_core.common.entrypoint import run_command; from studies import experiments\n"
    study += "experiments.workers = lambda: 2\n"
    study += "runs = {'first': {'alpha': 0.75}, 'second': {'alpha': 0.75, 'adapter_layers': 3}}\n"
    study += "run_command(lambda: experiments.run_all(runs, 'test'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", study], env=environment, start_new_session=True)
    logs = [Path(f".scaleot/experiments/{name}.log") for name in ("first", "second")]
    while not all(log.exists() and "cutting" in log.read_text(encoding="utf-8") for log in logs):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "stages/measure.py" not in commands and "--name=first" not in commands
    assert not subprocess.run(["git", "for-each-ref", "refs/exps/"], capture_output=True, text=True).stdout


def test_path_that_dvc_cannot_write_is_told_before_anything_runs(inside: Inside) -> None:
    inside(lambda base: repository(base / "Gewässer"))
    with pytest.raises(UserError, match=r"Gewässer.*: DVC can't run experiments .* `dvc cache dir --local"):
        experiments.run_all({"half": {"alpha": 0.5}}, "test")
    assert not Path(".scaleot").exists()
