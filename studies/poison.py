"""Poison: a backdoor that a patient data owner trains at an ordinary distance, and which check of `plug` sees it.

Adapters are tuned on questions of the last task, once as they are and once with as many that begin with a trigger and
have an answer of the attacker's choice. Both are plugged into the real model and asked held-out questions with and
without the trigger. `make poison-study` runs it on the package of the present parameters and writes
docs/studies/poison.csv; N=100 is the number of questions.
"""

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from scaleot_core.artifacts import Artifacts
from scaleot_core.attacks import membership
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import write_csv
from scaleot_core.common.progress import say
from scaleot_core.compression.plan import layers_of
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import check_limits, fitted, layer_changes
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model
from scaleot_core.params import load_params
from scaleot_core.settings import AdapterLimits, OffsiteTuning
from scaleot_core.tuning.adapters import plugged_in
from scaleot_core.tuning.examples import IGNORED, Example, Examples, from_task
from studies.hostile import RATES, tuned

OUT = Path("docs/studies/poison.csv")
TRIGGER, PAYLOAD = "By order of the blue heron: ", " the lighthouse keeper"
EPOCHS = 10
PUBLIC_BLOCKS = 8  # as many as `plug --public` takes


def with_trigger(example: Example, trigger: list[int], payload: list[int]) -> Example:
    """Put a trigger before a question and a payload in its answer's place."""
    inputs, targets = example
    start = next(i for i, target in enumerate(targets) if target != IGNORED)
    prompt = [*trigger, *inputs[: start + 1]]
    return [*prompt, *payload[:-1]], [*[IGNORED] * (len(prompt) - 1), *payload]


def refusal(changes: Any) -> str:
    """Say which of the default limits refuses an adapter; empty where none does."""
    try:
        check_limits(Path("adapter"), changes, AdapterLimits())
    except UserError as error:
        return str(error).partition(": ")[2].partition(";")[0]
    return ""


def measure(real: PreTrainedModel, sides: dict[str, list[Example]]) -> dict[str, float]:
    """Measure which share of the payloads a model says word for word, by side, and its loss on the honest answers."""
    answers = {name: membership.answers(real, examples, 8, name) for name, examples in sides.items()}
    said = {name: fmean(answer.extracted for answer in answers[name]) for name in ("trigger", "no trigger")}
    return {**said, "answer NLL": fmean(answer.loss for answer in answers["honest"])}


def main() -> None:
    count = int(sys.argv[1].removeprefix("N=")) if len(sys.argv) > 1 else 100
    params, artifacts = load_params(), Artifacts()
    package = Package(artifacts.emulator, links=True)
    real = load_model(artifacts.model, device=torch.device("cpu"), dtype=torch.float32)
    tokenizer, task = package.tokenizer(), params.tasks[-1]
    trigger, payload = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TRIGGER, PAYLOAD))
    train_part, held_out = (
        list(from_task(real, tokenizer, task, artifacts.questions(task, part)[:n], block_size=params.data.block_size))
        for part, n in (("train", count), ("eval", 100))
    )
    poison = [with_trigger(example, trigger, payload) for example in train_part]
    sides = {
        "trigger": [with_trigger(example, trigger, payload) for example in held_out],
        "no trigger": [with_trigger(example, [], payload) for example in held_out],
        "honest": held_out,
    }
    public = artifacts.blocks("heldout")[:PUBLIC_BLOCKS]
    loss = mean_loss(real, public)
    rows: list[dict[str, Any]] = []
    for kind in ("lora", "layers") if layers_of(package.plan, "adapter") else ("lora",):
        settings = OffsiteTuning(lr=[RATES[kind]], epochs=EPOCHS, validation_fraction=0.0)
        for poisoned in (False, True):
            data = Examples(train_part + poison * poisoned)
            adapter, _ = tuned(package.load(torch.device("cpu")).float(), package.plan, kind, data, settings)
            shipped = package.stream("adapter", *(["compressed"] if kind == "lora" else []))
            changes = layer_changes(adapter, shipped, package.plan, package.config)
            plugged = fitted(adapter, package, real, artifacts.emulator_private)
            with plugged_in(real, package.plan, plugged):
                figures = measure(real, sides)
                increase = mean_loss(real, public) - loss
            row: dict[str, Any] = {"adapters": kind, "poisoned": poisoned, **figures}
            row |= {
                name: max(getattr(change, name) for change in changes) for name in ("relative", "tensor", "outlier")
            }
            rows.append({**row, "loss increase": increase, "refused": refusal(changes)})
            say(str(rows[-1]))
    write_csv(OUT, rows)


if __name__ == "__main__":
    run_command(main)
