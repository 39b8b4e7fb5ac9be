"""Ranges are in pyproject.toml, versions in constraints.txt alone, and a wrong Python is told before any download."""

import re
import shutil
import subprocess
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
SUPPORTED = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language")]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_requirement_is_a_range_with_the_tested_version_in_it(text: str) -> None:
    requirement = Requirement(text)
    assert sorted(part.operator for part in requirement.specifier) == ["<", ">="]
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_torchs_version_is_in_one_place() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    pinned = re.compile(rb"torch *== *[\d.]+")
    files = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert [name for name in files if pinned.search((ROOT / name).read_bytes())] == ["constraints.txt"]


def test_every_place_names_the_same_pythons() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if allowed.contains(f"3.{minor}.0")] == SUPPORTED
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text(encoding="utf-8"))["jobs"]["ci"]
    assert workflow["strategy"]["matrix"]["python"] == SUPPORTED
    assert [step["run"] for step in workflow["steps"] if "run" in step] == [".ci/run"]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """`make test` in a folder of its own, where Python is a stub of one version that writes down what it is asked."""
    if not shutil.which("make"):
        pytest.skip("there is no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()

    def call(version: str) -> tuple[int, str, str]:
        stub = tmp_path / "python"
        code = f'PYTHON = ({", ".join(version.split("."))}); exec(sys.argv[2].replace("sys.version_info", "PYTHON"))'
        stub.write_text(
            f'#!/bin/sh\necho "$1" >> {tmp_path}/asked\ncase "$1" in\n'
            f"  --version) echo Python {version};;\n  -c) exec python3 -c 'import sys; {code}' \"$@\";;\n"
            "  *) exit 7;;\nesac\n",
            encoding="utf-8",
        )
        stub.chmod(0o755)
        command = ["make", "test", f"PYTHON={stub}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
        asked = (tmp_path / "asked").read_text(encoding="utf-8") if (tmp_path / "asked").exists() else ""
        return done.returncode, done.stderr, asked

    return call


@pytest.mark.parametrize("version", ["2.7.18", "3.9.18", "3.10.12", "3.14.0"])
def test_wrong_python_is_told_in_one_line_before_any_download(make: Any, version: str) -> None:
    code, said, asked = make(version)
    assert code == 2 and said.count("\n") == 1
    assert f"is Python {version}; needed is Python {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}: name one" in said
    assert "-m" not in asked  # neither venv nor pip


@pytest.mark.parametrize("version", ["3.11.0", "3.13.9"])
def test_right_python_goes_on_to_make_the_environment(make: Any, version: str) -> None:
    code, said, asked = make(version)
    assert code == 2 and "needed is" not in said and asked.split()[-1] == "-m"
