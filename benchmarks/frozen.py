"""What it costs to keep frozen matrices quantized while LoRA is tuned, and what the plug-in then is.

`python benchmarks/frozen.py none|int8|int4 [SEED]`, on what the default run left, prints one JSON object. Seconds are
those of the CPU in which this process ran, so that other work beside it counts little.
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from torch import nn

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.runtime import Runtime, setup
from scaleot_core.compression.quantization import QuantizedMatrix, check_kernels
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import Package
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.settings import Lora, OffsiteTuning, Quantization
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.cost import Meter
from scaleot_core.tuning import examples
from scaleot_core.tuning.adapters import TunedAdapter, plug_in, trainable
from scaleot_core.tuning.selection import tune

TASK, TRAINED, EVALUATED = "commonsense_qa_cloze", 300, 200
FORMS: dict[str, Quantization | None] = {"none": None, "int8": "int8", "int4": "int4"}


def held_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's parameters, of quantized ones those of codes and scales."""
    return sum(p.stored_bytes if isinstance(p, QuantizedMatrix) else p.nbytes for p in model.parameters())


def tuned(
    package: Package, form: Quantization | None, seed: int, runtime: Runtime, artifacts: Artifacts
) -> tuple[TunedAdapter, dict[str, Any]]:
    """Tune LoRA for an epoch; give it back as it would be sent, and what that cost."""
    if form:
        check_kernels(form, runtime.device)
    lora, process, resident = Lora(), psutil.Process(), [0]
    before = process.memory_info().rss
    model = package.load(runtime.device, form)
    figures: dict[str, Any] = {"parameters_mib": round(held_bytes(model) / 2**20, 1)}
    rows = artifacts.questions(TASK, "train")[:TRAINED]
    data = examples.from_task(model, package.tokenizer(), TASK, rows, block_size=256, packed=True)
    meter = Meter(runtime)
    meter.count(model)
    model.base_model.register_forward_hook(lambda *_: resident.append(process.memory_info().rss))
    parameters = trainable(model, package.plan, lora.form, seed)
    tuning = OffsiteTuning(epochs=1, lr=lora.lr)
    start = time.process_time()
    with TemporaryDirectory() as name:
        checkpoint = Checkpoint(Path(name), 1e9)
        result = tune(model, parameters, data, tuning, seed=seed, label="tune", checkpoint=checkpoint)
        figures |= {
            "tokens_per_cpu_second": round(meter.tokens / (time.process_time() - start)),
            "resident_mib": round((max(resident) - before) / 2**20),
            "last_loss": round(sum(row["loss"] for row in result.history[-5:]) / 5, 3),
        }
        sent = Path(name) / "adapter"
        sent.mkdir()
        adapter_folder.save(sent, package, parameters, lora=lora.form, tuning=tuning, tuned=result)
        return adapter_folder.read(sent, package), figures


def main() -> None:
    given = sys.argv[1:]
    if not 1 <= len(given) <= 2 or given[0] not in FORMS or not all(seed.isdecimal() for seed in given[1:]):
        raise UserError("name what the frozen matrices are kept in, and a seed: `frozen.py none|int8|int4 [SEED]`")
    form, seed = FORMS[given[0]], int(given[1]) if given[1:] else 0
    artifacts, params = Artifacts(), load_params()
    runtime = setup(params, "frozen")
    package = Package(artifacts.emulator, links=True)
    sent, figures = tuned(package, form, seed, runtime, artifacts)
    model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
    plug_in(model, package.plan, sent)
    questions = {TASK: artifacts.questions(TASK, "eval")[:EVALUATED]}
    measured = evaluate(model, load_tokenizer(artifacts.model), questions, batch_size=32, label="plug-in")[TASK]
    shown = {key: round(measured[key], 4) for key in ("acc", "acc_stderr", "answer_nll", "answer_nll_stderr")}
    print(json.dumps({"frozen": given[0], "seed": seed, **figures, **shown}))


if __name__ == "__main__":
    run_command(main)
