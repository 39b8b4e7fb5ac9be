"""A copy of the pipeline in a folder of its own, whose stages a benchmark runs one by one, and what they cost."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json
from scaleot_core.params import changed, load_params

FILES = ("stages", "dvc.yaml", "studies/dvc.yaml", "embedded.lock", "scaleot_core")

Cost = dict[str, float]
"""A stage's seconds, tokens and peak memory, by the names that cost files have."""


class Project:
    """The project's own files in `folder`, with params.yaml changed."""

    def __init__(self, folder: Path, changes: Mapping[str, Any]) -> None:
        self.folder = folder
        for name in FILES:
            source, target = Path(name), folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        params = changed(load_params(), dict(changes))
        (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")), encoding="utf-8")

    def run(self, stage: str) -> Cost:
        """Run a stage such as `offsite_tune piqa lora`; UserError with its last words where it fails."""
        script, *item = stage.split()
        command = [sys.executable, f"stages/{script}.py", *item]
        done = subprocess.run(command, cwd=self.folder, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        if done.returncode:
            raise UserError(f"{stage}: it failed; {' '.join(done.stderr.split())[-300:]}")
        return read_json(self.folder / "costs" / f"{stage.replace(' ', '-')}.json")  # type: ignore[no-any-return]
