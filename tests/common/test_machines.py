"""Machines other than ours: no `sched_getaffinity`, no `resource`, few CPUs, terminals that take ASCII alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import joblib
import pytest
from helpers import ROOT, tiny_model, write_package, write_project
from transformers import PreTrainedTokenizerFast

from scaleot_core.common import files, runtime
from scaleot_core.training import cost

LACKING = """
import ctypes, os, sys
import psutil  # whose part for Linux needs resource; the parts for other systems don't
del os.sched_getaffinity
sys.modules["resource"] = None
library = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **more: library(os.fspath(name), *rest, **more)  # None is a TypeError on Windows
"""
ASCII = (
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # file names too
)


def python(folder: Path, *arguments: str, **environment: str) -> str:
    """Run Python, which must end well; return its standard output, which must be ASCII."""
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | own, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    return done.stdout.decode("ascii")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A package, in a folder whose name ASCII can't say."""
    folder = tmp_path_factory.mktemp("machines") / "Gewässer"
    folder.mkdir()
    return write_package(folder / "päckage", tiny_model("llama"), tokenizer)


# --- what Linux has and others lack ----------------------------------------------------------------------


@pytest.fixture
def lacking(tmp_path: Path) -> str:
    """A PYTHONPATH on which Python starts without what only Linux has, or Windows has not."""
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "sitecustomize.py").write_text(LACKING, encoding="utf-8")
    return os.pathsep.join([str(tmp_path / "lacking"), str(ROOT)])


@pytest.mark.slow
def test_tune_without_affinity_resource_and_the_c_library(tmp_path: Path, package: Path, lacking: str) -> None:
    records = [json.dumps({"prompt": f"count to {i}", "completion": f" one to {i}"}) for i in range(20)]
    (tmp_path / "records.jsonl").write_text("\n".join(records), encoding="utf-8")
    command = ["-m", "scaleot_core.cli", "tune", str(package), "--data", "records.jsonl", "--out", "out", "--epochs=1"]
    python(tmp_path, *command, "--device=cpu", "--json", PYTHONPATH=lacking)
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.slow
def test_stage_without_affinity_resource_and_the_c_library(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lacking: str
) -> None:
    write_project(tmp_path, tokenizer, threads=0)
    python(tmp_path, "stages/prepare_data.py", PYTHONPATH=lacking)
    assert (tmp_path / "artifacts" / "corpus" / "train.safetensors").is_file()


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=300 * 2**20 // unit))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(cost.sys, "platform", system)
    assert cost.peak_memory() == 300 * 2**20


def test_peak_memory_without_resource_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 50 * 2**20 < cost.peak_memory() < 100 * 2**30


# --- CPUs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "omp", "cpus"),
    [(8, None, 8), (8, "3", 3), (2, "3", 2), (8, "3,2", 3), (8, "", 8), (8, "0", 8), (8, "many", 8)],
)
def test_cpus_are_what_the_machine_and_openmp_leave(
    monkeypatch: pytest.MonkeyPatch, available: int, omp: str | None, cpus: int
) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: available)
    monkeypatch.setenv("OMP_NUM_THREADS", omp or "")
    assert runtime.cpu_count() == cpus
    monkeypatch.setattr(runtime, "local_world_size", lambda: 4)  # processes, which share them unless OpenMP says more
    assert runtime.thread_count() == (cpus if omp in ("3", "3,2") else max(1, cpus // 4))


def test_cpus_are_no_more_than_affinity_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert runtime.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)


# --- terminals and locales -------------------------------------------------------------------------------

COMMANDS = """
import json, sys
from scaleot_core import cli
package = sys.argv[1]
for command in ("tune --help", "inspect PACKAGE", "inspect PACKAGE --json", "inspect PACKAGE.zip"):
    sys.argv = ["scaleot", *(word.replace("PACKAGE", package) for word in command.split())]
    try:
        cli.main()
    except SystemExit as end:
        print("ended with", end.code or 0)
from pathlib import Path
from scaleot_core.common.files import read_csv, write_csv, write_jsonl
write_csv(Path("a.csv"), [{"gap \\u00b1": "b\\u00e9ta", "x": 1.5}])
write_jsonl(Path("a.jsonl"), read_csv(Path("a.csv")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("environment", ASCII, ids=["ascii output", "ascii locale"])
def test_ascii_terminal_gets_help_tables_json_and_errors(
    tmp_path: Path, package: Path, environment: dict[str, str]
) -> None:
    said = python(tmp_path, "-c", COMMANDS, str(package), **environment)
    usage, table, as_json, refused, rest = said.split("ended with ")
    assert "--epsilon" in usage and "?" in usage  # the letters that ASCII lacks
    assert table.startswith("0\n+--") and "| sound" in table
    assert "ckage" in re.sub(r"[\s|]+", "", table)  # a long path goes over several lines
    found = json.loads(as_json.partition("\n")[2])
    path = found["path"].encode("utf-8", errors="surrogateescape").decode("utf-8")
    assert Path(path) == package and found["sound"] is True
    assert (refused, rest) == ("0\n", "1\n")
    assert files.read_jsonl(tmp_path / "a.jsonl") == [{"gap ±": "béta", "x": 1.5}]  # whatever the locale
