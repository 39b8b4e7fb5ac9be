"""Benchmarks: what we do against the plain thing a user would do otherwise, as ratios of seconds in one run.

Ours and the baseline alternate, so that a noisy machine disturbs both. `make bench` runs all on what the default run
left, prints one table and appends it to docs/benchmarks.md; `python benchmarks/bench.py tune evaluate` runs some. Where
the folder SCALEOT_TEST_DATA has HellaSwag and RACE, `evaluate` takes them too.
"""

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json, read_jsonl
from scaleot_core.common.progress import console, say
from scaleot_core.common.runtime import DTYPES, Runtime, cpu_count, setup
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression import emulator, svd
from scaleot_core.data import questions as task_questions
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import load_task
from scaleot_core.exchange.package import Package
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.params import Params, changed, load_params
from scaleot_core.settings import Tuning
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.tuning import examples
from scaleot_core.tuning.tuner import train
from studies.experiments import EMULATOR_STAGES

ARTIFACTS, COSTS, LOG = Path("artifacts"), Path("costs"), Path("docs/benchmarks.md")
ROUNDS = 3
LONGER = {"hellaswag": 20, "race": 8}  # tasks whose questions share long contexts, and how many
CHANNELS_ALONE = {
    "alpha": 0.0,
    "beta": 0.0,
    "channel_pruning.ratio": 0.51,
    "adapter_placement": "ends",
}  # the default's bytes

Row = dict[str, str]


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternating(ours: Callable[[], Any], baseline: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of both over some rounds, one after the other in each."""
    pairs = [(seconds(ours), seconds(baseline)) for _ in range(ROUNDS)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def row(what: str, ours: float, baseline: float, note: str = "") -> Row:
    return {
        "what": what,
        "ours": f"{ours:.1f} s",
        "baseline": f"{baseline:.1f} s",
        "times faster": f"{baseline / ours:.2f}",
        "note": note,
    }


def alone(what: str, ours: str, note: str) -> Row:
    """A row without a baseline."""
    return {"what": what, "ours": ours, "baseline": "", "times faster": "", "note": note}


def tune(params: Params, device: torch.device) -> list[Row]:
    """Tuning the adapter layers offsite, and every weight of the model, for one epoch of some questions."""
    package = Package(ARTIFACTS / "emulator", links=True)
    shipped = package.load(device)
    adapters = emulator.layer_parameters(shipped, package.plan, "adapter")
    offsite = params.offsite_tune.model_copy(update={"epochs": 1, "max_steps": 0})
    rows = [_tuning("tuning", shipped, adapters, offsite, 160, params)]
    del shipped, adapters
    model = load_model(ARTIFACTS / "model", device=device, dtype=DTYPES[params.dtype])
    every = dict(model.named_parameters())
    full = params.full_finetune.model_copy(update={"epochs": 1, "max_steps": 0})
    return [*rows, _tuning("full fine-tuning", model, every, full, 80, params)]


def training_examples(model: PreTrainedModel, count: int, params: Params) -> examples.Examples:
    """The first training questions of the first task, as tokens."""
    task = params.tasks[0]
    rows = read_jsonl(ARTIFACTS / "tasks" / task / "train.jsonl")[:count]
    tokenizer = load_tokenizer(ARTIFACTS / "model")
    return examples.from_task(model, tokenizer, task, rows, block_size=params.data.block_size)


def _tuning(
    what: str, model: PreTrainedModel, parameters: dict[str, nn.Parameter], settings: Tuning, count: int, params: Params
) -> Row:
    """One epoch by our loop, against one as in OT's scripts: shuffled batches, all logits, torch's own attention."""
    data, device = training_examples(model, count, params), model.device
    start = {name: p.detach().clone() for name, p in parameters.items()}
    losses: dict[str, list[float]] = {}

    def restart() -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(start[name])

    def ours() -> None:
        restart()
        history = train(model, parameters, data, settings, lr=settings.lr[0], seed=0, label=what)
        losses["ours"] = [step["loss"] for step in history]

    def baseline() -> None:
        restart()
        torch.backends.cuda.enable_flash_sdp(True)  # torch's default, which our loop may have changed
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr[0])
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        found = losses["baseline"] = []
        for at in range(0, len(order), settings.batch_size):
            inputs, targets = examples.collate([data[i] for i in order[at : at + settings.batch_size]])
            logits = model(input_ids=inputs.to(device), use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        model.requires_grad_(False)

    found = alternating(ours, baseline)
    ends = {name: statistics.fmean(values[-5:]) for name, values in losses.items()}
    note = f"last losses {ends['ours']:.2f} and {ends['baseline']:.2f}"
    return row(f"{what}, an epoch of {count} questions", *found, note)


def evaluation(params: Params, device: torch.device) -> list[Row]:
    """Evaluation of some questions of each task, against lm-eval's own model at batch size 8 on the same requests."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = load_model(ARTIFACTS / "model", device=device, dtype=DTYPES[params.dtype])
    tokenizer = load_tokenizer(ARTIFACTS / "model")
    figures: dict[str, float] = {}
    found = []
    asked_of = {task: read_jsonl(ARTIFACTS / "tasks" / task / "eval.jsonl")[:100] for task in params.tasks}
    if (folder := os.environ.get("SCALEOT_TEST_DATA")) is None:
        say("SCALEOT_TEST_DATA names no folder, so that HellaSwag and RACE are left out")
    else:
        for task, count in LONGER.items():
            asked_of[task] = task_questions.load(folder, task, wheel=None, train=1, evaluate=count, seed=0)[1]
    for task, questions in asked_of.items():

        def ours() -> None:
            size = params.evaluate.batch_size
            results = evaluate(model, tokenizer, {task: questions}, batch_size=size, label="bench")  # noqa: B023
            figures["ours"] = results[task]["acc"]  # noqa: B023

        def baseline() -> None:
            view = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
            asked = [load_task(task, questions, questions)]  # noqa: B023
            results = simple_evaluate(model=view, tasks=asked, bootstrap_iters=0)["results"]
            figures["baseline"] = results[task]["acc,none"]  # noqa: B023

        took = alternating(ours, baseline)
        same = "the same accuracy" if figures["ours"] == figures["baseline"] else f"accuracies differ: {figures}"
        found.append(row(f"evaluating {len(questions)} questions of {task}", *took, same))
    return found


def prepare(params: Params, device: torch.device) -> list[Row]:
    """Preparing the emulator, against OT's distillation until the same held-out perplexity at the same bytes.

    Ours twice: the default run's stages, and feed-forward channels alone beside OT's adapter layers, for which neither
    scores nor harmonizers are needed. The distillation starts anew with twice the steps until it is as good as both, or
    has taken 20 times as long.
    """
    train, heldout = (
        read_tensors(ARTIFACTS / "corpus" / f"{name}.safetensors")["blocks"] for name in ("train", "heldout")
    )

    def make(changes: dict[str, Any], folder: Path) -> tuple[float, float]:
        """Seconds that a method takes, and the held-out loss of its emulator."""
        runtime, checkpoint = Runtime(device, DTYPES[params.dtype]), Checkpoint(folder / "none", 1e9)
        changed_to, harmonizers = changed(params, changes), ARTIFACTS / "harmonizers"
        owner = ModelOwner(ARTIFACTS / "model", runtime, train, changed_to, harmonizers, folder, checkpoint)
        start = time.perf_counter()
        made = METHODS[changed_to.method](owner)
        model = emulator.assemble(owner.config, made.plan, made.tensors, device=device)
        took = time.perf_counter() - start
        loss = mean_loss(model, heldout)
        size = emulator.plan_bytes(owner.config, made.plan)
        say(f"{changes}: {took:.0f} s, {size:,} bytes, held-out loss {loss:.2f}")
        return took, loss

    stages = sum(read_json(COSTS / f"{stage}.json")["seconds"] for stage in EMULATOR_STAGES)
    shipped = mean_loss(Package(ARTIFACTS / "emulator", links=True).load(device), heldout)
    with TemporaryDirectory() as folder:
        alone = make(CHANNELS_ALONE, Path(folder))
        ours = {"the default run's stages": (stages, shipped), "feed-forward channels alone": alone}
        reached: dict[str, float] = {}
        took, steps = 0.0, 140
        while any(took < 20 * ours[name][0] for name in ours.keys() - reached.keys()):
            took, loss = make({"method": "distilled", "distill.steps": steps}, Path(folder))
            reached |= {name: took for name, (_, goal) in ours.items() if loss <= goal and name not in reached}
            steps *= 2
    rows = []
    for name, (seconds_taken, goal) in ours.items():
        note = f"until perplexity {math.exp(goal):.0f}" + ("" if name in reached else ", not reached in that time")
        rows.append(row(f"preparing the emulator: {name}", seconds_taken, reached.get(name, took), note))
    return rows


def decompose(params: Params, device: torch.device) -> list[Row]:
    """Decomposing one matrix for every rank, against LAPACK's singular value decomposition of it, whitened."""
    rows = []
    for width in (576, 2048, 4096):
        draw = torch.Generator().manual_seed(0)
        weight, inputs = (torch.randn(n, width, generator=draw) for n in (width, 2 * width))
        inputs *= torch.logspace(0, -3, width)
        covariance = inputs.T @ inputs
        whitener = torch.linalg.cholesky(svd.damped(covariance))
        rank, errors = width // 5, {}

        def error(left: torch.Tensor, right: torch.Tensor) -> float:
            rest = (weight.double() - left[:, :rank].double() @ right[:rank].double()) @ whitener  # noqa: B023
            return float(rest.norm())

        def ours() -> None:
            errors["ours"] = error(*svd.decompose(weight, covariance))  # noqa: B023

        def baseline() -> None:
            again = torch.linalg.cholesky(svd.damped(covariance))  # noqa: B023
            u, s, vt = torch.linalg.svd(weight.double() @ again, full_matrices=False)  # noqa: B023
            right = torch.linalg.solve_triangular(again, s[:, None] * vt, upper=False, left=False)
            errors["baseline"] = error(u, right)  # noqa: B023

        found = alternating(ours, baseline)
        note = f"error of rank {rank} over the SVD's: {errors['ours'] / errors['baseline']:.6f}"
        rows.append(row(f"decomposing a {width} x {width} matrix", *found, note))
    return rows


def compress(params: Params, device: torch.device) -> list[Row]:
    """Compressing random models of OPT-6.7B's width: what depth costs."""
    rows = []
    for layers in (2, 4):
        command = [sys.executable, str(Path(__file__).with_name("wide.py")), str(layers)]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        parts = ", ".join(f"{name} {found[name]:.1f} s" for name in ("reading", "decomposing", "writing"))
        peak, layer = found["peak_mib"], found["layer_mib"]
        what = f"compressing {layers} layers of OPT-6.7B's shapes (random weights)"
        note = f"{parts}; peak {peak:,.0f} MiB, {peak / layer:.1f} layers of {layer:.0f} MiB"
        rows.append(alone(what, f"{found['seconds']:.0f} s", note))
    return rows


def pipeline(params: Params, device: torch.device) -> list[Row]:
    """The pipeline with nothing to do, and what a stage spends on imports and loading."""
    idle = statistics.median(
        seconds(lambda: subprocess.run(["dvc", "repro"], capture_output=True, check=True)) for _ in range(ROUNDS)
    )
    code = "import runpy; runpy.run_path('stages/evaluate.py', run_name='bench')\n"
    code += "import pathlib, torch; from scaleot_core.models.loading import load_model\n"
    code += "load_model(pathlib.Path('artifacts/model'), device=torch.device('cpu'), dtype=torch.bfloat16)"
    command = [sys.executable, "-c", code]
    overhead = statistics.median(seconds(lambda: subprocess.run(command, check=True)) for _ in range(ROUNDS))
    return [
        alone("dvc repro with nothing to do", f"{idle:.1f} s", "limit 5 s"),
        alone("a stage's imports and loading", f"{overhead:.1f} s", "limit 10 s"),
    ]


def parts(params: Params, device: torch.device) -> list[Row]:
    """What a tuning step of the default adapters spends its time on: shares of the CPU's time, by operation."""
    package = Package(ARTIFACTS / "emulator", links=True)
    model = package.load(device)
    adapters = emulator.layer_parameters(model, package.plan, "adapter")
    data = training_examples(model, 80, params)
    settings = params.offsite_tune.model_copy(update={"epochs": 1, "max_steps": 0})
    train(model, adapters, data, settings, lr=settings.lr[0], seed=0, label="warm-up")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train(model, adapters, data, settings, lr=settings.lr[0], seed=0, label="profiled")
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(spent.values())
    most = sorted(spent, key=spent.__getitem__, reverse=True)[:12]
    note = ", ".join(f"{name.removeprefix('aten::')} {spent[name] / total:.1%}" for name in most)
    return [alone("a tuning epoch of 80 questions", f"{total / 1e6:.1f} s", note)]


BENCHES = {
    "tune": tune,
    "parts": parts,
    "evaluate": evaluation,
    "prepare": prepare,
    "pipeline": pipeline,
    "decompose": decompose,
    "compress": compress,
}


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHES)
    if unknown := set(chosen) - BENCHES.keys():
        raise UserError(f"no benchmark is named {min(unknown)!r}; there are {', '.join(BENCHES)}")
    params = load_params()
    runtime = setup(params, "bench")
    rows = [line for name in chosen for line in BENCHES[name](params, runtime.device)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{cpu_count()} cores of {platform.machine()}, {runtime.device.type}, {params.dtype}"
    table = Table(*rows[0], title=f"{machine}, torch {torch.__version__}")
    for line in rows:
        table.add_row(*line.values())
    console.print(table)
    lines = [
        f"| {' | '.join(rows[0])} |",
        "| --- " * len(rows[0]) + "|",
        *(f"| {' | '.join(r.values())} |" for r in rows),
    ]
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n## {datetime.date.today()}, {machine}, commit {commit}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(main)
