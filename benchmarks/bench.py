"""Benchmarks: what we do against the plain thing a user would do otherwise, as ratios of seconds in one run.

Ours and the baseline alternate, so that a noisy machine disturbs both. `make bench` runs all on what the default run
left, prints one table and appends it to docs/benchmarks.md; `python benchmarks/bench.py tune evaluate` runs some.
"""

import datetime
import math
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
from project import Project
from rich.table import Table
from transformers import PreTrainedModel

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json
from scaleot_core.common.progress import console, say
from scaleot_core.common.runtime import DTYPES, cpu_count, setup
from scaleot_core.compression import emulator
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import load_task
from scaleot_core.exchange.package import Package
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.params import Params, load_params
from scaleot_core.tuning import examples
from scaleot_core.tuning.tuner import train

ARTIFACTS, COSTS, LOG = Artifacts(), Path("costs"), Path("docs/benchmarks.md")
ROUNDS = 3
EMULATOR_STAGES = ("layer_importance", "train_harmonizers", "compress")
CHANNELS_ALONE = {"method": "channels", "channels.ratio": 0.51}  # the default's bytes

Row = dict[str, str]


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternating(ours: Callable[[], Any], baseline: Callable[[], Any]) -> tuple[float, float]:
    """Return the median seconds of both over some rounds, one after the other in each."""
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


def training_examples(model: PreTrainedModel, count: int, params: Params) -> examples.Examples:
    """Return the first training questions of the first task, as tokens."""
    task = params.tasks[0]
    rows = ARTIFACTS.questions(task, "train")[:count]
    tokenizer = load_tokenizer(ARTIFACTS.model)
    return examples.from_task(model, tokenizer, task, rows, block_size=params.data.block_size)


def tune(params: Params, device: torch.device) -> list[Row]:
    """Tuning the adapter layers for an epoch, against a loop as in OT's scripts: shuffled batches, all logits."""
    package, count, what = Package(ARTIFACTS.emulator, links=True), 160, "tuning"
    model = package.load(device)
    parameters = emulator.layer_parameters(model, package.plan, "adapter")
    settings = params.offsite_tune.model_copy(update={"epochs": 1, "max_steps": 0})
    data = training_examples(model, count, params)
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
        steps = losses["baseline"] = []
        for at in range(0, len(order), settings.batch_size):
            inputs, targets = examples.collate([data[i] for i in order[at : at + settings.batch_size]])
            logits = model(input_ids=inputs.to(device), use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        model.requires_grad_(False)

    medians = alternating(ours, baseline)
    ends = {name: statistics.fmean(values[-5:]) for name, values in losses.items()}
    note = f"last losses {ends['ours']:.2f} and {ends['baseline']:.2f}"
    return [row(f"{what}, an epoch of {count} questions", *medians, note)]


def evaluation(params: Params, device: torch.device) -> list[Row]:
    """Evaluation of some questions of each task, against lm-eval's own model at batch size 8 on the same requests."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = load_model(ARTIFACTS.model, device=device, dtype=DTYPES[params.dtype])
    tokenizer = load_tokenizer(ARTIFACTS.model)
    figures: dict[str, float] = {}
    rows = []
    for task in params.tasks:
        questions = ARTIFACTS.questions(task, "eval")[:100]

        def ours() -> None:
            size = params.evaluate.batch_size
            results = evaluate(model, tokenizer, {task: questions}, batch_size=size, label="bench")  # noqa: B023
            figures["ours"] = results[task]["acc"]  # noqa: B023

        def baseline() -> None:
            view = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
            asked = [load_task(task, questions, questions)]  # noqa: B023
            results = simple_evaluate(model=view, tasks=asked, bootstrap_iters=0)["results"]
            figures["baseline"] = results[task]["acc,none"]  # noqa: B023

        medians = alternating(ours, baseline)
        same = "the same accuracy" if figures["ours"] == figures["baseline"] else f"accuracies differ: {figures}"
        rows.append(row(f"evaluating {len(questions)} questions of {task}", *medians, same))
    return rows


def prepare(params: Params, device: torch.device) -> list[Row]:
    """Preparing the emulator, against OT's distillation until the same held-out perplexity at the same bytes.

    Ours twice: the default run's stages, and channels alone, which need neither scores nor harmonizers. The
    distillation starts anew with twice the steps until it is as good as both, or has taken 20 times as long.
    """
    heldout = ARTIFACTS.blocks("heldout")

    def make(changes: dict[str, Any]) -> tuple[float, float]:
        """Return the seconds that stage compress takes, and the held-out loss of its emulator."""
        with TemporaryDirectory() as name:
            project = Project(Path(name), changes)
            (project.folder / "artifacts").mkdir()
            for folder in (ARTIFACTS.model, ARTIFACTS.corpus, ARTIFACTS.harmonizers):
                (project.folder / folder).symlink_to(folder.resolve())
            seconds_taken = project.run("compress")["seconds"]
            package = Package(project.folder / ARTIFACTS.emulator)
            loss = mean_loss(package.load(device), heldout)
        say(f"{changes}: {seconds_taken:.0f} s, held-out loss {loss:.2f}")
        return seconds_taken, loss

    stages = sum(
        read_json(COSTS / f"{stage}.json")["seconds"] for stage in ("layer_importance", "train_harmonizers", "compress")
    )
    shipped = mean_loss(Package(ARTIFACTS.emulator, links=True).load(device), heldout)
    ours = {"the default run's stages": (stages, shipped), "feed-forward channels alone": make(CHANNELS_ALONE)}
    reached: dict[str, float] = {}
    distilled_seconds, steps = 0.0, 140
    while any(distilled_seconds < 20 * ours[name][0] for name in ours.keys() - reached.keys()):
        distilled_seconds, loss = make({"method": "distilled", "distill.steps": steps})
        reached |= {name: distilled_seconds for name, (_, goal) in ours.items() if loss <= goal and name not in reached}
        steps *= 2
    rows = []
    for name, (seconds_taken, goal) in ours.items():
        note = f"until perplexity {math.exp(goal):.0f}" + ("" if name in reached else ", not reached in that time")
        baseline = reached.get(name, distilled_seconds)
        rows.append(row(f"preparing the emulator: {name}", seconds_taken, baseline, note))
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


BENCHES = {
    "tune": tune,
    "evaluate": evaluation,
    "prepare": prepare,
    "pipeline": pipeline,
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
