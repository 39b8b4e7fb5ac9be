"""Stage evaluate: the five measurements of every task, metrics.json, curves and pictures.

Reads everything. Each finished measurement is kept until the stage ends, so that a stopped evaluation goes on.
"""

import math
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import (
    atomic_folder,
    cached_json,
    fingerprint,
    folder_bytes,
    read_json,
    read_jsonl,
    write_json,
)
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression import emulator
from scaleot_core.compression.plan import LayerKind
from scaleot_core.evaluation import measurements
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import load_task
from scaleot_core.evaluation.tasks import metrics as metrics_of
from scaleot_core.exchange import adapter, package
from scaleot_core.exchange.manifest import manifest_sha256
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.reporting import figures, tables
from scaleot_core.training.checkpoint import scratch_dir
from scaleot_core.training.cost import Meter

ARTIFACTS, COSTS = Path("artifacts"), Path("costs")


def main() -> None:
    params = load_params()
    runtime = setup(params, "evaluate")
    meter = Meter(runtime)
    folders = [ARTIFACTS / name for name in ("model", "emulator", "adapters", "tasks", "corpus")]
    done = scratch_dir(f"evaluate-{fingerprint(params.dtype, params.tasks, *folders)}")

    questions = {task: read_jsonl(ARTIFACTS / "tasks" / task / "eval.jsonl") for task in params.tasks}
    heldout = read_tensors(ARTIFACTS / "corpus" / "heldout.safetensors")["blocks"]
    tokenizer = load_tokenizer(ARTIFACTS / "model")
    size = params.evaluate.batch_size

    model, plan = package.load(ARTIFACTS / "emulator", device=runtime.device)
    shipped, identity = (
        emulator.layer_parameters(model, plan, "adapter"),
        manifest_sha256(ARTIFACTS / "emulator"),
    )
    adapters = {
        task: adapter.read(ARTIFACTS / "adapters" / task / "adapter", model, plan, shipped, package=identity)
        for task in params.tasks
    }
    emulator_loss = cached_json(done / "emulator_loss.json", partial(mean_loss, model, heldout))
    label = "emulator_zero_shot"
    measure = partial(evaluate, model, tokenizer, questions, batch_size=size, label=label)
    untuned = cached_json(done / f"{label}.json", measure)
    tuned: dict[str, dict[str, Any]] = {}
    for name in ("emulator_finetune", "plug_in"):
        if name == "plug_in":
            model = load_model(ARTIFACTS / "model", device=runtime.device, dtype=runtime.dtype)
        tuned[name] = {}
        for task in params.tasks:
            emulator.plug_in(model, plan, adapters[task])
            tuned_along = ARTIFACTS / "adapters" / task / "harmonizers.safetensors"
            if name == "emulator_finetune" and tuned_along.exists():
                emulator.plug_in(model, plan, read_tensors(tuned_along), "harmonizer")
            only, label = {task: questions[task]}, f"{name}@{task}"
            measure = partial(evaluate, model, tokenizer, only, batch_size=size, label=label)
            tuned[name][task] = cached_json(done / f"{label}.json", measure)[task]

    tasks = {}
    for task in params.tasks:
        measured: dict[str, Any] = {
            "zero_shot": read_json(ARTIFACTS / "baselines" / f"zero_shot-{task}.json"),
            "full_finetune": read_json(ARTIFACTS / "baselines" / f"full_finetune-{task}" / "results.json"),
            "emulator_zero_shot": untuned[task],
            **{name: results[task] for name, results in tuned.items()},
        }
        better = metrics_of(load_task(task, questions[task]))
        measured |= {"metrics": list(better), "less_is_better": [metric for metric, more in better.items() if not more]}
        rates = {
            "offsite_tune": read_json(ARTIFACTS / "adapters" / task / "tuning.json")["lr"],
            "full_finetune": read_json(ARTIFACTS / "baselines" / f"full_finetune-{task}" / "tuning.json")["lr"],
        }
        tasks[task] = measured | measurements.utility(measured) | {"lr": rates}
    model_bytes, emulator_bytes = (folder_bytes(ARTIFACTS / name, ".safetensors") for name in ("model", "emulator"))
    model_loss = read_json(ARTIFACTS / "importance" / "scores.json")["model_heldout_loss"]
    metrics = {
        "tasks": tasks,
        "splits": "cut by prepare_data; not comparable to results on the official ones",
        "emulator": {
            "bytes": emulator_bytes,
            "model_bytes": model_bytes,
            "share_of_model": emulator_bytes / model_bytes,
            **{f"{kind}_layers": len(plan.layers(kind)) for kind in get_args(LayerKind)},
        },
        "corpus_perplexity": {"model": math.exp(model_loss), "emulator": math.exp(emulator_loss)},
        "cost": {file.stem: read_json(file) for file in sorted(COSTS.glob("*.json"))} | {"evaluate": meter.read()},
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers", "datasets")},
    }
    histories = {
        "layer_importance": read_json(ARTIFACTS / "importance" / "history.json"),
        "train_harmonizers": read_json(ARTIFACTS / "harmonizers" / "history.json"),
        **{f"offsite_tune@{t}": read_json(ARTIFACTS / "adapters" / t / "history.json") for t in params.tasks},
        **{
            f"full_finetune@{t}": read_json(ARTIFACTS / "baselines" / f"full_finetune-{t}" / "history.json")
            for t in params.tasks
        },
    }
    layers = read_json(ARTIFACTS / "harmonizers" / "scores.json") | {"kinds": plan.kinds}
    with atomic_folder(Path("plots")) as out:
        tables.write_curves(out / "loss", histories)
        tables.write_layers(out / "layers.csv", layers["prior"], layers["scores"], layers["kinds"])
        figures.save_png(figures.measurements(tasks), out / "measurements.png")
        figures.save_png(figures.layers(layers), out / "layers.png")
        figures.save_png(figures.curves(histories), out / "curves.png")
    write_json(Path("metrics.json"), metrics)
    tables.show(metrics)
    shutil.rmtree(done)


if __name__ == "__main__":
    run_command(main)
