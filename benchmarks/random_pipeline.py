"""The pipeline in a folder of its own, on a model of random weights: what its stages cost, and no claim."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from random_weights import write_model
from transformers import PretrainedConfig

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json, write_json, write_jsonl
from scaleot_core.params import changed, load_params

FILES = ("stages", "dvc.yaml", "studies/dvc.yaml", "embedded.lock", "scaleot_core")
STAGES = (  # as `run` takes them; those that a benchmark may leave out, or run otherwise, aren't here
    "prepare_data",
    "layer_importance",
    "train_harmonizers",
    "compress",
    "offsite_tune piqa layers",
    "offsite_tune piqa lora",
    "zero_shot piqa",
)
LOCAL = {"model": "model", "tasks": ["piqa"], "data.questions": "questions", "data.corpus": "corpus.jsonl"}

Cost = dict[str, float]
"""A stage's seconds, tokens and peak memory, by the names that cost files have."""


class RandomPipeline:
    """A project whose stages run one by one on a model of random weights, with `piqa` as its only task."""

    def __init__(self, folder: Path, config: PretrainedConfig, *, questions: int, passages: int) -> None:
        """Write what the stages need: the model, twice as many questions as are trained on, a corpus, our own files."""
        self.folder = folder
        for name in FILES:
            source, target = Path(name), folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        write_model(folder / "model", config)
        for part, numbers in (("train", range(questions)), ("validation", range(questions, 2 * questions))):
            rows = [
                {"goal": f"count to {i}", "sol1": f"from 1 to {i}", "sol2": f"from {i}", "label": 0} for i in numbers
            ]
            write_jsonl(folder / "questions" / "piqa" / f"{part}.jsonl", rows)
        texts = [{"text": f"passage {i} " + " ".join(str(i * k % 97) for k in range(60))} for i in range(passages)]
        write_jsonl(folder / "corpus.jsonl", texts)

    def write_params(self, changes: Mapping[str, Any]) -> None:
        params = changed(load_params(), {**LOCAL, **changes})
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")), encoding="utf-8")

    def run(self, stage: str) -> Cost:
        """Run a stage such as `offsite_tune piqa lora`; UserError with its last words where it fails.

        `evaluate` finds zero-shot figures in the place of full fine-tuning's where that wasn't run.
        """
        script, *item = stage.split()
        if script == "evaluate":
            self._pretend_full_finetune()
        command = [sys.executable, f"stages/{script}.py", *item]
        done = subprocess.run(command, cwd=self.folder, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        if done.returncode:
            raise UserError(f"{stage}: it failed; {' '.join(done.stderr.split())[-300:]}")
        if script == "evaluate":
            return read_json(self.folder / "metrics.json")["cost"][script]  # type: ignore[no-any-return]
        at = "artifacts/attack/cost.json" if script == "attack" else f"costs/{'-'.join([script, *item])}.json"
        return read_json(self.folder / at)  # type: ignore[no-any-return]

    def _pretend_full_finetune(self) -> None:
        baselines = self.folder / "artifacts" / "baselines"
        folder, zero_shot = baselines / "full_finetune-piqa", baselines / "zero_shot-piqa.json"
        if zero_shot.exists() and not folder.exists():
            write_json(folder / "results.json", read_json(zero_shot))
            write_json(folder / "tuning.json", {"lr": 0.0})
            write_json(folder / "history.json", [])
