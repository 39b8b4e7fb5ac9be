"""Measure the emulator and the plug-in on every task, and collect what all stages found into metrics.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.files import cached_json, folder_bytes, read_json
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression.plan import LayerKind, Plan, layers_of
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import Rows, load_task
from scaleot_core.evaluation.tasks import metrics as metrics_of
from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import fitted
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.reporting.measurements import Figures, Measured, Metrics, utility
from scaleot_core.tuning.adapters import TunedAdapter, plug_in, tuned_emulator

TaskAndKind = tuple[str, str]


@dataclass(frozen=True)
class Evaluated:
    """What stage evaluate measures."""

    model_loss: float
    """Mean next-token loss (nats) of the real model on the held-out blocks."""
    emulator_loss: float
    """The emulator's."""
    emulator_zero_shot: dict[str, Figures]
    """By task."""
    emulator_finetune: dict[TaskAndKind, Figures]
    plug_in: dict[TaskAndKind, Figures]


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

    One model at a time is in memory: each adapter is plugged into a model of its own, since LoRA in every layer changes
    nearly all of it. Each finished measurement is kept in `cache`, so that a stopped evaluation goes on. UserError for
    an adapter that isn't sound.
    """
    package = Package(artifacts.emulator, links=True)
    adapters = {
        (task, kind): adapter_folder.read(artifacts.adapter(task, kind) / "adapter", package, links=True)
        for task in questions
        for kind in kinds
    }
    evaluate_once = partial(_evaluate_once, load_tokenizer(artifacts.model), batch_size, cache)
    emulator_finetune, plugged = dict[TaskAndKind, Figures](), dict[TaskAndKind, Figures]()
    heldout = artifacts.blocks("heldout")
    model_loss = cached_json(
        cache / "model_loss.json",
        lambda: mean_loss(load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype), heldout),
    )
    model = package.load(runtime.device)
    emulator_loss = cached_json(cache / "emulator_loss.json", partial(mean_loss, model, heldout))
    zero_shot = evaluate_once("emulator_zero_shot", model, questions)
    for (task, kind), adapter in adapters.items():
        with tuned_emulator(model, package.plan, adapter):
            asked = {task: questions[task]}
            emulator_finetune[task, kind] = evaluate_once(f"emulator_finetune@{task}-{kind}", model, asked)[task]
    del model
    for (task, kind), adapter in adapters.items():
        load = partial(_load_plug_in, artifacts, package, adapter, runtime)
        plugged[task, kind] = evaluate_once(f"plug_in@{task}-{kind}", load, {task: questions[task]})[task]
    return Evaluated(model_loss, emulator_loss, zero_shot, emulator_finetune, plugged)


def _load_plug_in(artifacts: Artifacts, package: Package, adapter: TunedAdapter, runtime: Runtime) -> PreTrainedModel:
    model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
    plug_in(model, package.plan, fitted(adapter, package, model, artifacts.emulator_private))
    return model


def _evaluate_once(
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    cache: Path,
    label: str,
    model: PreTrainedModel | Callable[[], PreTrainedModel],
    questions: Mapping[str, Rows],
) -> dict[str, Figures]:
    """Evaluate a model, or what loads it, unless `cache` has its figures of before."""

    def run() -> dict[str, dict[str, Any]]:
        loaded = model if isinstance(model, PreTrainedModel) else model()
        return evaluate(loaded, tokenizer, questions, batch_size=batch_size, label=label)

    figures: dict[str, Figures] = cached_json(cache / f"{label}.json", run)
    return figures


def collect(artifacts: Artifacts, questions: Mapping[str, Rows], evaluated: Evaluated) -> Metrics:
    """Put all measurements, sizes, perplexities and versions together: metrics.json."""
    tasks: dict[str, Measured] = {}
    for task, rows in questions.items():
        ceiling = artifacts.full_finetune(task)
        higher_is_better = metrics_of(load_task(task, rows))
        tasks[task] = {
            "metrics": list(higher_is_better),
            "lower_is_better": [metric for metric, higher in higher_is_better.items() if not higher],
            "zero_shot": read_json(artifacts.zero_shot(task)),
            "full_finetune": read_json(ceiling / "results.json"),
            "emulator_zero_shot": evaluated.emulator_zero_shot[task],
            "lr": read_json(ceiling / "tuning.json")["lr"],
            "adapters": {},
        }
    for (task, kind), figures in evaluated.plug_in.items():
        tuned = {"emulator_finetune": evaluated.emulator_finetune[task, kind], "plug_in": figures}
        tasks[task]["adapters"][kind] = {
            "emulator_finetune": tuned["emulator_finetune"],
            "plug_in": figures,
            "lr": read_json(artifacts.adapter(task, kind) / "tuning.json")["lr"],
            **utility({**tasks[task], **tuned}),
        }
    package = Package(artifacts.emulator, links=True)
    return {
        "tasks": tasks,
        "splits": "cut by prepare_data; not comparable to results on the official ones",
        "emulator": {"package": package.sha256, **_sizes(artifacts, package.plan)},
        "corpus_perplexity": {"model": math.exp(evaluated.model_loss), "emulator": math.exp(evaluated.emulator_loss)},
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers", "datasets")},
    }


def _sizes(artifacts: Artifacts, plan: Plan) -> dict[str, Any]:
    size = folder_bytes(artifacts.emulator, ".safetensors")
    model_size = folder_bytes(artifacts.model, ".safetensors")
    return {
        "bytes": size,
        "model_bytes": model_size,
        "share_of_model": size / model_size,
        **{f"{kind}_layers": len(layers_of(plan, kind)) for kind in get_args(LayerKind)},
    }


def loss_histories(artifacts: Artifacts, tasks: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Read the loss a step of every stage that trained, by the stage's name."""
    folders = {
        "layer_importance": artifacts.importance,
        "train_harmonizers": artifacts.harmonizers,
        **{f"offsite_tune@{task}-{kind}": artifacts.adapter(task, kind) for task in tasks for kind in kinds},
        **{f"full_finetune@{task}": artifacts.full_finetune(task) for task in tasks},
    }
    histories = {name: read_json(folder / "history.json") for name, folder in folders.items()}
    return {name: history for name, history in histories.items() if history}
