"""Hostile: what an adapter tells the owner of a package with a trap, of the default package and the last task.

The same questions are tuned on in the package as it is and in a copy with detectors in one layer's feed-forward part
(`attacks/hostile_owner.py`), without privacy and with it, and each adapter is read by the loss attack and by the trap.
`make hostile-study` runs it and writes docs/studies/hostile.csv; N=40 is the number of questions tuned on.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.artifacts import Artifacts
from scaleot_core.attacks import hostile_owner, membership
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_csv
from scaleot_core.common.progress import say
from scaleot_core.compression.plan import Plan, layers_of
from scaleot_core.exchange.package import Package
from scaleot_core.params import load_params
from scaleot_core.settings import LoraForm, OffsiteTuning
from scaleot_core.tuning.adapters import TunedAdapter, TunedLayers, TunedLora, trainable, tuned_emulator
from scaleot_core.tuning.examples import Examples, from_task
from scaleot_core.tuning.lora import remove_lora
from scaleot_core.tuning.tuner import train, train_privately

OUT = Path("docs/studies/hostile.csv")
LAYER = 3  # of the trap: deep enough that the last token's state tells the text, shallow enough that it tells the token
CONTROLS = 20  # texts that nobody has
TOKENS = 200  # that the trap looks for: the rarest of those in at least two candidates
EPSILONS = (0.0, 8.0, 3.0)
RATES = {"lora": 1e-3, "layers": OffsiteTuning().lr[0]}


def tuning(kind: str, epsilon: float, records: int) -> OffsiteTuning:
    """Return `scaleot tune`'s defaults for three epochs, or, with ε, the private study's."""
    if not epsilon:
        return OffsiteTuning(lr=[RATES[kind]], epochs=3, validation_fraction=0.0)
    private = {"epsilon": epsilon, "delta": 1 / (2 * records), "max_grad_norm": 0.5, "validation_fraction": 0.0}
    rate = 0.01 if kind == "lora" else RATES[kind]
    return OffsiteTuning.model_validate({"lr": rate, "epochs": 3, "batch_size": max(1, records // 8), **private})


def tuned(
    model: PreTrainedModel, plan: Plan, kind: str, data: Examples, settings: OffsiteTuning
) -> tuple[TunedAdapter, dict[str, Tensor]]:
    """Tune an adapter on all of the data; return it, and how far each weight moved. The model is then what it was."""
    form = LoraForm() if kind == "lora" else None
    parameters = trainable(model, plan, form, seed=0)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    if settings.epsilon:
        seed, label = int(1000 * settings.epsilon), f"ε = {settings.epsilon:g}"
        train_privately(model, parameters, data, settings, seed=seed, label=label)
    else:
        train(model, parameters, data, settings, lr=settings.lr[0], seed=0, label=f"tune {kind}")
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    change = {name: weight.float() - start[name].float() for name, weight in weights.items()}
    if form:
        remove_lora(model)
        return TunedLora.from_peft(form, weights, model.config), change
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    return TunedLayers(weights), change


def main() -> None:
    records = int(sys.argv[1].removeprefix("N=")) if len(sys.argv) > 1 else 40
    params, artifacts = load_params(), Artifacts()
    task = params.tasks[-1]
    package = Package(artifacts.emulator, links=True)
    tokenizer, adapter_layers = package.tokenizer(), layers_of(package.plan, "adapter")
    meta = package.meta_model
    questions = artifacts.questions(task, "train")[: 5 * records]
    candidates = from_task(meta, tokenizer, task, questions, block_size=params.data.block_size)
    data = Examples(candidates[:records])
    others = candidates[records:]
    controls = from_task(meta, tokenizer, task, artifacts.questions(task, "eval")[:CONTROLS], block_size=256)
    counts = Counter(token for tokens, _ in candidates for token in set(tokens))
    tokens: list[hostile_owner.Target] = [t for t, n in sorted(counts.items(), key=lambda pair: pair[1]) if n > 1]
    texts = [inputs for inputs, _ in [*candidates, *controls]]
    targets = [*tokens[:TOKENS], *texts]
    seen = {token for inputs, _ in data for token in inputs}
    truth = [target in seen if isinstance(target, int) else i < TOKENS + records for i, target in enumerate(targets)]
    sides = (data, others[: len(data)])
    rows: list[dict[str, Any]] = []
    for kind, layer in {"lora": LAYER, **({"layers": adapter_layers[0]} if adapter_layers else {})}.items():
        model = package.load(torch.device("cpu")).float()
        for is_trap in (False, True):
            if is_trap:
                trap = hostile_owner.set_trap(model, layer, targets, artifacts.blocks("train")[:40].tolist())
                say(f"the trap in layer {layer} has {int(trap.separable.sum())} of {len(targets)} targets")
            base = [membership.answers(model, side, 8, "before") for side in sides]
            for epsilon in EPSILONS if is_trap else EPSILONS[:1]:
                adapter, change = tuned(model, package.plan, kind, data, tuning(kind, epsilon, records))
                with tuned_emulator(model, package.plan, adapter):
                    losses = membership.attack(base, [membership.answers(model, side, 8, "after") for side in sides])
                row: dict[str, Any] = {"adapters": kind, "package": "trap" if is_trap else "honest"}
                row |= {"epsilon": epsilon or None}
                row["loss AUC"] = max(losses[name]["auc"] for name in ("loss", "calibrated"))
                if is_trap:
                    changes = hostile_owner.channel_changes(model, layer, change)
                    row |= hostile_owner.figures(trap, hostile_owner.read(trap, changes), truth, len(controls))
                rows.append(row)
                say(str(row))
    write_csv(OUT, [dict.fromkeys(rows[-1]) | row for row in rows])


if __name__ == "__main__":
    run_command(main)
