"""Seconds and peak memory of compressing a model of OPT-6.7B's true shapes, of so many layers, from disk to disk.

`python benchmarks/wide.py LAYERS` prints one JSON object. The weights are random: speed and memory only, no claim.
Peak memory is as Linux has it, above that of the interpreter with all imports.
"""

import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_weights import write_model
from transformers import OPTConfig

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import write_json
from scaleot_core.common.runtime import Runtime
from scaleot_core.common.tensors import TensorWriter, write_tensors
from scaleot_core.compression import svd
from scaleot_core.compression.harmonizer import Harmonizer
from scaleot_core.exchange import package
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.loading import load_tokenizer
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.params import changed, load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir

WIDTH, BLOCKS = 4096, 8


def timed(times: dict[str, float], name: str, action: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return action(*args)
        finally:
            times[name] += time.perf_counter() - start

    return wrapped


def write_parts(folder: Path, layers: int, rank: int) -> int:
    """A random model with scores and harmonizers; the bytes of a layer."""
    config = OPTConfig(
        hidden_size=WIDTH,
        ffn_dim=4 * WIDTH,
        num_attention_heads=32,
        num_hidden_layers=layers,
        word_embed_proj_dim=WIDTH,
    )
    shapes = write_model(folder, config)
    write_json(folder / "scores.json", {"scores": [float(i) for i in range(layers)]})
    form = load_params().harmonizer.model_copy(update={"rank": rank})
    stored = {f"{i}.{n}": t for i in range(layers) for n, t in Harmonizer(WIDTH, form).state_dict().items()}
    write_tensors(folder / "harmonizers.safetensors", stored)
    return sum(2 * math.prod(shape) for name, (shape, _) in shapes.items() if ".layers.0." in name)


def memory(name: str) -> float:
    """MiB that the process has, `VmRSS`, or had at most, `VmHWM`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        raise UserError(f"say how many layers: python {sys.argv[0]} 4")
    layers = int(sys.argv[1])
    torch.manual_seed(0)
    small = {
        "method": "scaleot",
        "max_bytes_ratio": 0.0,
        "adapter_layers": 1,
        "alpha": 0.0,
        "beta": 0.8,
        "harmonizer.rank": 256,
        "rank_compression.whiten": True,
        "rank_compression.calibration_blocks": BLOCKS,
        "after_src.steps": 0,
    }
    params, times = changed(load_params(), small), defaultdict[str, float](float)
    svd.decompose = timed(times, "decomposing", svd.decompose)
    StreamedModel.read = timed(times, "reading", StreamedModel.read)  # type: ignore[method-assign]
    TensorWriter.write = timed(times, "writing", TensorWriter.write)  # type: ignore[method-assign]
    place = scratch_dir("bench")
    place.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(Path("artifacts/model"))
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        layer = write_parts(folder, layers, rank=256)
        blocks = torch.randint(0, 50000, (BLOCKS, 256), dtype=torch.int32)
        runtime = Runtime(torch.device("cpu"), torch.bfloat16)
        owner = ModelOwner(folder, runtime, blocks, params, folder, folder / "scratch", Checkpoint(folder, 1e9))
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew here
        before, start = memory("VmRSS"), time.perf_counter()
        made = METHODS["scaleot"](owner)
        (folder / "package").mkdir()
        package.save(folder / "package", owner.config, tokenizer, made.plan, made.tensors)
        seconds = time.perf_counter() - start
    figures = {"layer_mib": layer / 2**20, "peak_mib": memory("VmHWM") - before, "seconds": seconds}
    print(json.dumps(figures | dict(times)))


if __name__ == "__main__":
    run_command(main)
