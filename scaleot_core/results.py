"""Measure the emulator and the plug-in on every task, and collect what all stages found into metrics.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.files import cached_json, folder_bytes, read_json
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression.plan import LayerKind, Plan, layers_of
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import Rows, load_task
from scaleot_core.evaluation.tasks import metrics as metrics_of
from scaleot_core.exchange import adapter
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import fitted
from scaleot_core.exchange.scale import BLOCKS, measure_scale
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer, read_config
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.reporting.measurements import utility
from scaleot_core.tuning.adapters import TunedAdapter, plug_in, tuned_emulator

Figures = dict[str, Any]
"""One measurement's figures on one task, as `harness.evaluate` gives them."""


@dataclass(frozen=True)
class Evaluated:
    """What stage evaluate measures."""

    emulator_zero_shot: dict[str, Figures]
    """By task."""
    adapters: dict[str, dict[str, dict[str, Any]]]
    """By task and kind: emulator_finetune and plug_in, and the model owner's scale (`exchange.scale`)."""
    emulator_loss: float
    """Mean next-token loss (nats) of the emulator on the held-out blocks."""


def measure(
    artifacts: Artifacts,
    questions: Mapping[str, Rows],
    kinds: Sequence[str],
    runtime: Runtime,
    *,
    batch_size: int,
    cache: Path,
) -> Evaluated:
    """Measure on every task the emulator untuned, each adapter in the emulator, and each in the real model.

    One model at a time is in memory: each adapter is plugged into a model of its own, since what LoRA in every layer
    changes is nearly all of it. Each finished measurement is kept in `cache`, so that a stopped evaluation goes on.
    UserError for an adapter that isn't sound.
    """
    tokenizer, package = load_tokenizer(artifacts.model), Package(artifacts.emulator, links=True)
    plan, public = package.plan, artifacts.blocks("train")[:BLOCKS]
    streamed = StreamedModel(artifacts.model, read_config(artifacts.model), device=runtime.device, dtype=runtime.dtype)
    tuned = {
        (task, kind): adapter.read(artifacts.adapter(task, kind) / "adapter", package, links=True)
        for task in questions
        for kind in kinds
    }

    def figures(load: Callable[[], PreTrainedModel], label: str, asked: Mapping[str, Rows]) -> dict[str, Figures]:
        def run() -> dict[str, Figures]:
            return evaluate(load(), tokenizer, asked, batch_size=batch_size, label=label)

        found: dict[str, Figures] = cached_json(cache / f"{label}.json", run)
        return found

    found: dict[str, dict[str, dict[str, Any]]] = {task: {kind: {} for kind in kinds} for task in questions}

    def in_emulator() -> tuple[dict[str, Figures], float]:
        model = package.load(runtime.device)
        loss = cached_json(cache / "emulator_loss.json", partial(mean_loss, model, artifacts.blocks("heldout")))
        zero_shot = figures(lambda: model, "emulator_zero_shot", questions)
        for (task, kind), given in tuned.items():
            label = f"emulator_finetune@{task}-{kind}"
            with tuned_emulator(model, plan, given):
                found[task][kind]["emulator_finetune"] = figures(lambda: model, label, {task: questions[task]})[task]
        return zero_shot, loss

    def plugged(given: TunedAdapter) -> PreTrainedModel:
        model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
        plug_in(model, plan, given)
        return model

    zero_shot, loss = in_emulator()
    for (task, kind), given in tuned.items():
        there = fitted(given, package, streamed.model, artifacts.emulator_private)
        label = f"plug_in@{task}-{kind}"
        found[task][kind]["plug_in"] = figures(partial(plugged, there), label, {task: questions[task]})[task]
        run = partial(_scale, streamed, package, given, there, public)
        found[task][kind]["scale"] = cached_json(cache / f"scale@{task}-{kind}.json", run)
    return Evaluated(zero_shot, found, loss)


def _scale(model: StreamedModel, package: Package, tuned: TunedAdapter, fitted: TunedAdapter, public: Tensor) -> float:
    return measure_scale(model, package, tuned, fitted, public).scale


def collect(
    artifacts: Artifacts, questions: Mapping[str, Rows], evaluated: Evaluated, costs: Mapping[str, Any]
) -> dict[str, Any]:
    """Put all measurements, sizes, perplexities, costs and versions together: metrics.json."""
    tasks = {}
    for task, rows in questions.items():
        ceiling = artifacts.full_finetune(task)
        better = metrics_of(load_task(task, rows))
        found: dict[str, Any] = {
            "metrics": list(better),
            "lower_is_better": [metric for metric, higher in better.items() if not higher],
            "zero_shot": read_json(artifacts.zero_shot(task)),
            "full_finetune": read_json(ceiling / "results.json"),
            "emulator_zero_shot": evaluated.emulator_zero_shot[task],
            "lr": read_json(ceiling / "tuning.json")["lr"],
        }
        adapters = {
            kind: {**figures, "lr": read_json(artifacts.adapter(task, kind) / "tuning.json")["lr"]}
            for kind, figures in evaluated.adapters[task].items()
        }
        tasks[task] = found | {"adapters": {kind: f | utility(found | f) for kind, f in adapters.items()}}
    model_loss = read_json(artifacts.importance / "scores.json")["model_heldout_loss"]
    package = Package(artifacts.emulator, links=True)
    return {
        "tasks": tasks,
        "splits": "cut by prepare_data; not comparable to results on the official ones",
        "emulator": {"package": package.sha256, **_sizes(artifacts, package.plan)},
        "corpus_perplexity": {"model": math.exp(model_loss), "emulator": math.exp(evaluated.emulator_loss)},
        "cost": costs,
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers", "datasets")},
    }


def _sizes(artifacts: Artifacts, plan: Plan) -> dict[str, Any]:
    size, whole = (folder_bytes(folder, ".safetensors") for folder in (artifacts.emulator, artifacts.model))
    return {
        "bytes": size,
        "model_bytes": whole,
        "share_of_model": size / whole,
        **{f"{kind}_layers": len(layers_of(plan, kind)) for kind in get_args(LayerKind)},
    }


def loss_histories(artifacts: Artifacts, tasks: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Read the loss a step of every stage that trains, by the stage's name."""
    folders = {
        "layer_importance": artifacts.importance,
        "train_harmonizers": artifacts.harmonizers,
        **{f"offsite_tune@{task}-{kind}": artifacts.adapter(task, kind) for task in tasks for kind in kinds},
        **{f"full_finetune@{task}": artifacts.full_finetune(task) for task in tasks},
    }
    return {name: read_json(folder / "history.json") for name, folder in folders.items()}
