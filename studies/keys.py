"""Identify all that a run's figures depend on: its parameters, the code, and one's own model, questions and corpus.

Whatever the studies keep outside DVC has this key, so that no figure of other code or other data is read back.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.common.files import fingerprint
from scaleot_core.data.fingerprints import source_fingerprints
from scaleot_core.params import changed, load_params

NEUTRAL_PARAMS = {"device", "threads", "launch", "checkpoint_seconds"}  # cannot change a result
DRAWING = Path("scaleot_core/reporting/figures.py")  # neither can this code
PIPELINE = ("dvc.yaml",)  # all of its stages, as a target
ATTACK = (*PIPELINE, "studies/dvc.yaml:attack")

Changes = Mapping[str, Any]
"""To params.yaml, by names such as `dlr.steps`."""


def code(*targets: str) -> list[Path]:
    """List the project's own files that DVC's targets depend on.

    dvc.yaml, or a stage of it, stands for all of its stages, since others run before; FILE:STAGE for that one alone.
    """
    stages: list[dict[str, Any]] = []
    for target in targets:
        path, _, stage = target.rpartition(":")
        entries = yaml.safe_load(Path(path or "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        stages += [entries[stage]] if path else entries.values()
    deps = {Path(dep) for stage in stages for dep in stage["deps"] if not dep.startswith("artifacts/")}
    files = [file for dep in sorted(deps) for file in (sorted(dep.rglob("*")) if dep.is_dir() else [dep])]
    return [file for file in files if file.suffix in {".py", ".yaml", ".lock"} and file != DRAWING]


def run_keys(runs: Mapping[str, Changes], *targets: str) -> dict[str, str]:
    """Return the key of each run of these targets, by the run's name; UserError for a wrong parameter."""
    code_key, data_keys, keys = fingerprint(*code(*targets)), dict[str, str](), dict[str, str]()
    for name, changes in runs.items():
        params = changed(load_params(), dict(changes))
        sources = params.model_dump_json(include={"model", "model_revision", "tasks", "data"})
        if sources not in data_keys:
            data_keys[sources] = fingerprint(source_fingerprints(params))
        keys[name] = fingerprint(params.model_dump(exclude=NEUTRAL_PARAMS), code_key, data_keys[sources])
    return keys
