"""Peak memory of every stage on models of LLaMA-7B's widths, of a few layers each, and what 32 layers would take.

`python benchmarks/memory.py 3 4 5` runs the pipeline on a model of each depth, and compress once more by each other
method that trains nothing, and prints a table: MiB of the stage's own process at each depth, what a layer adds, and the
line through the first depth and the last at 32 layers, which a depth between them confirms or doesn't. The weights are
random, blocks and batches small: memory only, no claim. Full fine-tuning, the method `distilled` and the attack, which
train every weight or most, aren't run: they take 16 bytes and more a weight.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from random_pipeline import STAGES, RandomPipeline
from rich.table import Table
from transformers import LlamaConfig

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import console
from scaleot_core.training.checkpoint import scratch_dir

WHOLE = 32  # decoder layers of LLaMA-7B
SMALL: dict[str, Any] = {  # channels cut alike, a layer that is shipped whole, and both kinds of adapters
    "device": "cpu",
    "alpha": 0.0,
    "beta": 0.0,
    "channel_pruning.ratio": 0.45,
    "adapter_layers": 1,
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
METHODS = ("uniform", "crash", "gradot")
ROWS = (*STAGES, "evaluate", *(f"compress: {method}" for method in METHODS))


def peaks(layers: int, place: Path) -> dict[str, float]:
    """Run the stages in turn on a model of so many layers; give each one's peak in MiB."""
    found = {}
    with tempfile.TemporaryDirectory(dir=place) as name:
        config = LlamaConfig(num_hidden_layers=layers)  # the rest is that of LLaMA-7B
        pipeline = RandomPipeline(Path(name), config, questions=8, passages=40)
        pipeline.write_params(SMALL)
        for row in ROWS:
            stage, _, method = row.partition(": ")
            if method:
                pipeline.write_params({**SMALL, "method": method})
            console.print(f"{layers} layers: {row}")
            found[row] = pipeline.run(stage)["peak_memory_mib"]
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
