"""DVC's experiments and its queue, on a pipeline that takes no time: in every shape that a clone and its path have."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT

from scaleot_core.common.errors import UserError
from studies import dvc_queue, experiments

PIPELINE = """stages:
  measure:
    cmd: python stages/measure.py
    deps:
      - stages/measure.py
    params:
      - alpha
      - adapter_layers
    metrics:
      - metrics.json:
          cache: false
"""
MEASURE = """import json
lines = open("params.yaml", encoding="utf-8").read().splitlines()
values = dict(line.partition("#")[0].split(":", 1) for line in lines if line[:1].isalpha())
assert int(values["adapter_layers"]) < 50, "too many"
json.dump({"emulator": {"alpha": float(values["alpha"])}}, open("metrics.json", "w"))
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


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], Path]], None]:
    """Go into a project of a shape, with no patience to poll and nothing of this machine's DVC."""
    for name in [name for name in os.environ if name.startswith("DVC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setattr(experiments, "POLL_SECONDS", 0.5)
    monkeypatch.setattr(experiments, "workers", lambda: 1)
    return lambda shape: monkeypatch.chdir(shape(tmp_path))


@pytest.mark.parametrize(
    "shape",
    [subfolder_with_spaces, worktree, submodule, shallow_clone_behind_a_link, letters_outside_ascii],
    ids=lambda shape: shape.__name__,
)
def test_experiment_is_made_and_read_back_wherever_the_project_lies(
    inside: Callable[[Callable[[Path], Path]], None], shape: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside(shape)
    assert experiments.run("half", {"alpha": 0.5})["emulator.alpha"] == 0.5
    monkeypatch.setattr(experiments, "_queue", lambda *arguments: pytest.fail("it is there"))
    assert dict(experiments.run_all({"half": {"alpha": 0.5}}, "test"))["half"]["alpha"] == 0.5
    stage = Path("stages/measure.py")
    stage.write_text(stage.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"experiment half: it is there, made before stages/measure\.py was changed"):
        experiments.run("half", {"alpha": 0.5})


def test_queue_in_a_subfolder_tells_what_ended_and_what_failed(
    inside: Callable[[Callable[[Path], Path]], None],
) -> None:
    inside(subfolder_with_spaces)
    runs = experiments.run_all({"half": {"alpha": 0.5}, "too-many": {"adapter_layers": 99}}, "test")
    name, row = next(runs)
    assert (name, row["emulator.alpha"]) == ("half", 0.5)
    with pytest.raises(UserError, match="experiment too-many: it failed; `dvc queue logs too-many`"):
        next(runs)
    (failed,) = dvc_queue.tasks()
    assert (failed.name, failed.state, failed.base) == ("too-many", "failed", experiments._commit())


def test_queue_that_nobody_works_off_is_told(
    inside: Callable[[Callable[[Path], Path]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside(plain)
    call_dvc = experiments._dvc
    monkeypatch.setattr(experiments, "_dvc", lambda *command: None if command[0] == "queue" else call_dvc(*command))
    monkeypatch.setattr(experiments, "IDLE_SECONDS", 2.0)
    with pytest.raises(UserError, match="experiment half: DVC has no worker for it; `dvc queue kill`"):
        dict(experiments.run_all({"half": {"alpha": 0.5}}, "test"))
    (waiting,) = dvc_queue.tasks()
    assert (waiting.name, waiting.state) == ("half", "waiting")


def test_workers_that_ended_are_started_anew(
    inside: Callable[[Callable[[Path], Path]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may take an earlier `dvc queue stop` for its own, end after its first run and leave the rest."""
    inside(plain)
    call_dvc, starts = experiments._dvc, []

    def late(*command: str) -> None:
        if command[:2] == ("queue", "start"):
            starts.append(command)
            if len(starts) == 1:
                return
        call_dvc(*command)

    monkeypatch.setattr(experiments, "_dvc", late)
    assert dict(experiments.run_all({"half": {"alpha": 0.5}}, "test"))["half"]["alpha"] == 0.5
    assert len(starts) >= 2


def test_path_that_dvc_cannot_write_is_told_before_anything_runs(
    inside: Callable[[Callable[[Path], Path]], None],
) -> None:
    inside(lambda base: repository(base / "Gewässer"))
    for work in (lambda: experiments.run("half", {}), lambda: dict(experiments.run_all({"half": {}}, "test"))):
        with pytest.raises(UserError, match=r"Gewässer.*: DVC can't run experiments .* `dvc cache dir --local"):
            work()
    assert not dvc_queue.tasks()


def test_folder_without_dvc_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="DVC can't read its project: ") as refused:
        dvc_queue.tasks()
    assert "\n" not in str(refused.value)
