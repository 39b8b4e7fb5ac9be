"""Peak memory of every stage on models of LLaMA-7B's widths, of a few layers each, and what 32 layers would take.

`python benchmarks/memory.py 3 4 5` runs the pipeline on a model of each depth, and compress once more by each other
method that trains nothing, and prints a table: MiB of the stage's own process at each depth, what a layer adds, and the
line through the first depth and the last at 32 layers, which a depth between them confirms or doesn't. The weights are
random, blocks and batches small: memory only, no claim. Full fine-tuning, the method `distilled` and the attack, which
train every weight or most, aren't run: they take 16 bytes and more a weight.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from random_weights import write_model
from rich.table import Table
from transformers import LlamaConfig

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json, write_json
from scaleot_core.common.progress import console
from scaleot_core.params import changed, load_params
from scaleot_core.training.checkpoint import scratch_dir

WHOLE = 32  # decoder layers of LLaMA-7B
SMALL: dict[str, Any] = {  # the preset `recommended`, but with a layer that is shipped whole and both kinds of adapters
    "device": "cpu",
    "model": "model",
    "tasks": ["piqa"],
    "alpha": 0.0,
    "beta": 0.0,
    "channel_pruning.ratio": 0.45,
    "adapter_layers": 1,
    "data.questions": "questions",
    "data.corpus": "corpus.jsonl",
    "data.block_size": 128,
    "data.train_blocks": 12,
    "data.heldout_blocks": 2,
    "harmonizer.rank": 256,
    "layer_importance.calibration_blocks": 4,
    "layer_importance.steps": 2,
    "layer_importance.sensitivity_blocks": 1,
    "dlr.group_size": 2,
    "dlr.candidates": 2,
    "dlr.steps": 2,
    "dlr.score_interval": 1,
    "dlr.score_blocks": 2,
    "dlr.batch_blocks": 1,
    "rank_compression.calibration_blocks": 4,
    "crash.calibration_blocks": 4,
    "gradot.calibration_blocks": 4,
    "offsite_tune.epochs": 1,
    "offsite_tune.batch_size": 4,
}
STAGES = (
    "prepare_data",
    "layer_importance",
    "train_harmonizers",
    "compress",
    "offsite_tune piqa layers",
    "offsite_tune piqa lora",
    "zero_shot piqa",
    "evaluate",
)
METHODS = ("uniform", "crash", "gradot")
ROWS = (*STAGES, *(f"compress: {method}" for method in METHODS))


def write_project(folder: Path, layers: int) -> None:
    """Write what the stages need: the model, a few questions, a corpus, and the project's own files."""
    for name in ("stages", "dvc.yaml", "embedded.lock", "scaleot_core"):
        source, ignore = Path(name), shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder)
    write_model(folder / "model", LlamaConfig(num_hidden_layers=layers))  # the rest is that of LLaMA-7B
    (folder / "questions" / "piqa").mkdir(parents=True)
    for part, numbers in (("train", range(8)), ("validation", range(8, 16))):
        rows = [{"goal": f"count to {i}", "sol1": f"from 1 to {i}", "sol2": f"from {i}", "label": 0} for i in numbers]
        (folder / "questions" / "piqa" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = [{"text": f"passage {i} " + " ".join(str(i * k % 97) for k in range(60))} for i in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    write_params(folder)


def write_params(folder: Path, **more: str) -> None:
    params = changed(load_params(), {**SMALL, **more})
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")), encoding="utf-8")


def pretend_full_finetune(baselines: Path) -> None:
    """Put the zero-shot figures where stage evaluate looks for those of full fine-tuning, which isn't run here."""
    folder = baselines / "full_finetune-piqa"
    write_json(folder / "results.json", read_json(baselines / "zero_shot-piqa.json"))
    write_json(folder / "tuning.json", {"lr": 0.0})
    write_json(folder / "history.json", [])


def peaks(layers: int, place: Path) -> dict[str, float]:
    """Run the stages in turn on a model of so many layers; give each one's peak in MiB."""
    found = {}
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        write_project(folder, layers)
        for row in ROWS:
            stage, _, method = row.partition(": ")
            script, *item = stage.split()
            if stage == "evaluate":
                pretend_full_finetune(folder / "artifacts" / "baselines")
            if method:
                write_params(folder, method=method)
            console.print(f"{layers} layers: {row}")
            command = [sys.executable, f"stages/{script}.py", *item]
            done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
            if done.returncode:
                raise UserError(f"{row}: it failed; {' '.join(done.stderr.split())[-300:]}")
            file = folder / "costs" / f"{'-'.join([script, *item])}.json"
            cost = read_json(file) if file.exists() else read_json(folder / "metrics.json")["cost"][script]
            found[row] = float(cost["peak_memory_mib"])
    return found


def main() -> None:
    depths = sorted({int(argument) for argument in sys.argv[1:] if argument.isdecimal()})
    if len(depths) < 2 or depths[0] < 3 or len(depths) < len(sys.argv) - 1:
        raise UserError(f"name two numbers of layers or more, from 3 on: python {sys.argv[0]} 3 4 5")
    place = scratch_dir("bench")
    place.mkdir(parents=True, exist_ok=True)
    found = {depth: peaks(depth, place.resolve()) for depth in depths}
    first, *_, last = found
    table = Table("stage", *(f"{depth} layers" for depth in found), "a layer", f"{WHOLE} layers", title="peak MiB")
    for row in ROWS:
        slope = (found[last][row] - found[first][row]) / (last - first)
        cells = [*(each[row] for each in found.values()), slope, found[last][row] + slope * (WHOLE - last)]
        table.add_row(row, *(f"{cell:,.0f}" for cell in cells))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
