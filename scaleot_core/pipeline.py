"""One stage of the pipeline as dvc.yaml declares it, which is the one place that says what a stage depends on.

A stage gets its parameters, its artifacts and a checkpoint keyed by exactly the parameters and dependencies of its
entry, so that a checkpoint is resumed if, and only if, DVC would take the stage's result to be the same.
"""

import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.artifacts import Artifacts
from scaleot_core.common import distributed
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import fingerprint, write_json
from scaleot_core.common.runtime import Runtime, setup
from scaleot_core.params import Params, load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.cost import Meter

DVC_YAML, COSTS = Path("dvc.yaml"), Path("costs")


@dataclass(frozen=True)
class Entry:
    """What dvc.yaml says of one stage, for one item of its matrix."""

    name: str
    """As DVC prints it, such as `offsite_tune@piqa`."""
    params: tuple[str, ...]
    deps: tuple[Path, ...]
    outs: tuple[Path, ...]

    def values(self, params: Params) -> dict[str, Any]:
        """Give the values of the parameters that the stage depends on, by names such as `dlr.steps`."""
        values = params.model_dump(mode="json")
        return {name: reduce(lambda block, key: block[key], name.split("."), values) for name in self.params}

    @property
    def code(self) -> tuple[Path, ...]:
        """The dependencies that are code, and not what an earlier stage wrote."""
        return tuple(dep for dep in self.deps if dep.parts[0] != "artifacts")

    @property
    def cost(self) -> Path:
        """The file of what the stage's last run here cost, which is no output: no two runs take the same time."""
        return COSTS / f"{self.name.replace('@', '-')}.json"


def matrix_of(stage: str, file: Path = DVC_YAML) -> tuple[str, ...]:
    """Give the names of a stage's matrix, in the order of its command's arguments; empty without a matrix."""
    return tuple(_stages(file)[stage].get("matrix", ()))


def read_entry(stage: str, item: Mapping[str, str] | None = None, file: Path = DVC_YAML) -> Entry:
    """Read a stage's entry in dvc.yaml, for an item of its matrix."""
    entry, item = _stages(file)[stage], item or {}

    def paths(declared: list[Any]) -> tuple[Path, ...]:
        names = (next(iter(path)) if isinstance(path, dict) else path for path in declared)
        return tuple(Path(re.sub(r"\$\{item\.(\w+)\}", lambda match: item[match.group(1)], name)) for name in names)

    name = f"{stage}@{'-'.join(item.values())}" if item else stage
    return Entry(name, tuple(entry.get("params", ())), paths(entry.get("deps", [])), paths(entry.get("outs", [])))


def _stages(file: Path) -> dict[str, Any]:
    try:
        stages: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; run from the project's folder") from None
    return stages


@dataclass
class Stage:
    """What a stage's script works with."""

    params: Params
    runtime: Runtime
    entry: Entry
    checkpoint: Checkpoint
    meter: Meter
    artifacts: Artifacts = field(default_factory=Artifacts)

    @property
    def label(self) -> str:
        """The stage's name for progress lines."""
        return self.entry.name

    def kept(self, name: str) -> Path:
        """Return the scratch folder for what later runs use again, keyed by all code that the stage depends on.

        Folders that other code made are removed.
        """
        folder = scratch_dir(f"{name}-{fingerprint(*(path for path in self.entry.code if path.exists()))}")
        for other in folder.parent.glob(f"{name}-*"):
            if other != folder and distributed.is_main_process():
                shutil.rmtree(other, ignore_errors=True)
        return folder


@contextmanager
def run_stage(stage: str, item: Mapping[str, str] | None = None, file: Path = DVC_YAML) -> Iterator[Stage]:
    """Set a stage up; once its block ends well, write its cost and drop its checkpoint.

    Raises UserError for a wrong parameter or a missing device.
    """
    params, entry = load_params(), read_entry(stage, item, file)
    runtime = setup(params, entry.name)
    key = fingerprint(entry.values(params), *(dep for dep in entry.deps if dep.exists()))
    checkpoint = Checkpoint(scratch_dir(f"{entry.name.replace('@', '-')}-{key}"), params.checkpoint_seconds)
    meter = Meter(runtime)
    yield Stage(params, runtime, entry, checkpoint, meter)
    write_json(entry.cost, meter.read())
    checkpoint.remove()


def item_from_arguments(stage: str) -> dict[str, str]:
    """Read a matrix stage's item from the command line; UserError if params.yaml doesn't have it."""
    names, arguments, params = matrix_of(stage), sys.argv[1:], load_params()
    keys = [_stages(DVC_YAML)[stage]["matrix"][name].strip("${}") for name in names]
    choices = [getattr(params, key) for key in keys]
    if len(arguments) != len(names) or any(a not in values for a, values in zip(arguments, choices, strict=True)):
        usage = " ".join("|".join(values) for values in choices)
        what = " and ".join(f"one of the {key}" for key in keys)
        raise UserError(f"name {what} that params.yaml has, as in `python {sys.argv[0]} {usage}`")
    return dict(zip(names, arguments, strict=True))
