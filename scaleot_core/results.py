"""Measure the emulator and the plug-in on every task, and collect what all stages found into metrics.json."""

import math
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.files import cached_json, folder_bytes, read_json
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression.emulator import plug_in
from scaleot_core.compression.plan import LayerKind, Plan
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import Rows, load_task
from scaleot_core.evaluation.tasks import metrics as metrics_of
from scaleot_core.exchange import adapter
from scaleot_core.exchange.package import Package
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.reporting.measurements import utility

Figures = dict[str, Any]
"""One measurement's figures on one task, as `harness.evaluate` gives them."""


def measure(
    artifacts: Artifacts, questions: Mapping[str, Rows], runtime: Runtime, *, batch_size: int, cache: Path
) -> tuple[dict[str, dict[str, Figures]], float]:
    """Measure emulator_zero_shot, emulator_finetune and plug_in on every task; and the emulator's loss on the corpus.

    Each finished measurement is kept in `cache`, so that a stopped evaluation goes on. Returns the measurements by
    name and task, and the mean next-token loss (nats) on the held-out blocks. UserError for an adapter that isn't
    sound.
    """
    tokenizer, package = load_tokenizer(artifacts.model), Package(artifacts.emulator)
    adapters = {task: adapter.read(artifacts.adapter(task) / "adapter", package) for task in questions}

    def figures(label: str, asked: Mapping[str, Rows]) -> dict[str, Figures]:
        run = partial(evaluate, model, tokenizer, asked, batch_size=batch_size, label=label)
        found: dict[str, Figures] = cached_json(cache / f"{label}.json", run)
        return found

    model = package.load(runtime.device)
    loss = cached_json(cache / "emulator_loss.json", partial(mean_loss, model, artifacts.blocks("heldout")))
    measured = {"emulator_zero_shot": figures("emulator_zero_shot", questions)}
    for name in ("emulator_finetune", "plug_in"):
        if name == "plug_in":
            model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
        measured[name] = {}
        for task, rows in questions.items():
            plug_in(model, package.plan, adapters[task])
            measured[name] |= figures(f"{name}@{task}", {task: rows})
    return measured, loss


def collect(
    artifacts: Artifacts,
    questions: Mapping[str, Rows],
    measured: Mapping[str, Mapping[str, Figures]],
    emulator_loss: float,
    costs: Mapping[str, Any],
) -> dict[str, Any]:
    """Put all measurements, sizes, perplexities, costs and versions together: metrics.json."""
    tasks = {}
    for task, rows in questions.items():
        tuned = artifacts.full_finetune(task)
        found: dict[str, Any] = {
            "zero_shot": read_json(artifacts.zero_shot(task)),
            "full_finetune": read_json(tuned / "results.json"),
            **{name: figures[task] for name, figures in measured.items()},
        }
        better = metrics_of(load_task(task, rows))
        found |= {
            "metrics": list(better),
            "lower_is_better": [metric for metric, higher in better.items() if not higher],
        }
        rates = {
            "offsite_tune": read_json(artifacts.adapter(task) / "tuning.json")["lr"],
            "full_finetune": read_json(tuned / "tuning.json")["lr"],
        }
        tasks[task] = found | utility(found) | {"lr": rates}
    model_loss = read_json(artifacts.importance / "scores.json")["model_heldout_loss"]
    return {
        "tasks": tasks,
        "splits": "cut by prepare_data; not comparable to results on the official ones",
        "emulator": _sizes(artifacts, Package(artifacts.emulator).plan),
        "corpus_perplexity": {"model": math.exp(model_loss), "emulator": math.exp(emulator_loss)},
        "cost": costs,
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers", "datasets")},
    }


def _sizes(artifacts: Artifacts, plan: Plan) -> dict[str, Any]:
    size, whole = (folder_bytes(folder, ".safetensors") for folder in (artifacts.emulator, artifacts.model))
    return {
        "bytes": size,
        "model_bytes": whole,
        "share_of_model": size / whole,
        **{f"{kind}_layers": len(plan.layers(kind)) for kind in get_args(LayerKind)},
    }


def loss_histories(artifacts: Artifacts, tasks: list[str]) -> dict[str, Any]:
    """Read the loss a step of every stage that trains, by the stage's name."""
    folders = {
        "layer_importance": artifacts.importance,
        "train_harmonizers": artifacts.harmonizers,
        **{f"offsite_tune@{task}": artifacts.adapter(task) for task in tasks},
        **{f"full_finetune@{task}": artifacts.full_finetune(task) for task in tasks},
    }
    return {name: read_json(folder / "history.json") for name, folder in folders.items()}
