"""Peak memory and seconds of handing over a package of LLaMA-7B's widths, of so many layers, in bfloat16.

`python benchmarks/handover.py LAYERS` prints a line for each command of the two parties. The weights are random: memory
and speed only, no claim. Peak memory is the resident set that Linux has of each command's own process.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_weights import byte_tokenizer, drawn, write_model
from transformers import LlamaConfig

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import folder_bytes, write_json
from scaleot_core.compression.emulator import meta_emulator, tensor_shapes
from scaleot_core.compression.plan import LayerKind, Plan
from scaleot_core.exchange import adapter_folder, package
from scaleot_core.params import load_params
from scaleot_core.pipeline import read_entry
from scaleot_core.settings import LoraForm, OffsiteTuning
from scaleot_core.training.checkpoint import scratch_dir
from scaleot_core.tuning.lora import lora_features
from scaleot_core.tuning.selection import TuningResult

LOAD = "import sys, torch; from pathlib import Path; from scaleot_core.exchange.package import Package; "
LOAD += "Package(Path(sys.argv[1])).load(torch.device('cpu'))"


def write_parties(folder: Path, layers: int) -> None:
    """What the commands need: a project with its package, the real model, and an adapter of LoRA in the attention."""
    config, tokenizer = LlamaConfig(num_hidden_layers=layers), byte_tokenizer()  # the rest is that of LLaMA-7B
    write_model(folder / "model", config)
    form = load_params().harmonizer
    kinds: list[LayerKind] = ["adapter" if i == 0 else "compressed" for i in range(layers)]
    plan = Plan(tuple(kinds), 0.8, form)
    emulator = folder / "artifacts" / "emulator"
    emulator.mkdir(parents=True)
    parts = tensor_shapes(meta_emulator(config, plan, buffers_too=True), plan)
    tensors = ((name, drawn(name, shape)) for part in parts.values() for name, (shape, _) in part.items())
    package.save(emulator, config, tokenizer, plan, tensors)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(name, folder)
    write_json(folder / "artifacts" / "emulator.private.json", {"params": read_entry("compress").values(load_params())})
    shutil.copytree(emulator, folder / "copy")
    given, lora = package.Package(folder / "copy"), LoraForm(modules="attention")
    factors = {
        f"{name}.lora_{part}.default.weight": drawn(name, shape)
        for name, (into, out) in lora_features(given.meta_model, plan, lora).items()
        for part, shape in (("A", (lora.rank, into)), ("B", (out, lora.rank)))
    }
    (folder / "adapter").mkdir()
    adapter_folder.save(
        folder / "adapter", given, factors, lora=lora, tuning=OffsiteTuning(), tuned=TuningResult([], 1e-3, 1, {})
    )


def run(label: str, *command: object) -> None:
    """Run a command, and print its peak memory and seconds."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{label}: ended with {status}")
    print(f"{label}: {usage.ru_maxrss / 1024:,.0f} MiB, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        raise UserError(f"say how many layers: python {sys.argv[0]} 12")
    place = scratch_dir("bench")
    place.mkdir(parents=True, exist_ok=True)
    cli = ("-m", "scaleot_core.cli")
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        write_parties(folder, int(sys.argv[1]))
        sizes = [folder_bytes(folder / part, ".safetensors") / 1e9 for part in ("model", "copy", "adapter")]
        print("model {:.2f} GB, package {:.2f} GB, adapter {:.3f} GB".format(*sizes), flush=True)
        plug = (*cli, "plug", folder / "model", folder / "adapter", "--package", folder / "copy", "--out")
        run("imports alone", "-c", "import scaleot_core.exchange.package, scaleot_core.tuning.lora")
        run("pack", *cli, "pack", "--project", folder, "--out", folder / "packed.zip")
        run("inspect", *cli, "inspect", folder / "packed.zip")
        run("tune, as far as the package is loaded", "-c", LOAD, folder / "copy")
        run("check", *cli, "check", folder / "adapter", "--package", folder / "copy")
        run("plug", *plug, folder / "plugged")


if __name__ == "__main__":
    run_command(main)
