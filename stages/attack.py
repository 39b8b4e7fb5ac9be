"""Stage attack, off the main path: what an attacker makes of the package, and of the adapters that came back.

Reads everything, as only a study can. Each finished attack is kept until the stage ends, so that a stopped one goes on.
Its entry is in studies/dvc.yaml; `make attack` runs it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from scaleot_core.attacks import exposure, hidden, membership, restoration
from scaleot_core.attacks.capabilities import Yardstick
from scaleot_core.attacks.targets import Target, targets
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, cached_json, write_csv, write_json
from scaleot_core.exchange import adapter
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import fitted, kept_channels
from scaleot_core.methods import ModelOwner
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.pipeline import run_stage
from scaleot_core.training.blocks import prepare
from scaleot_core.tuning import examples
from scaleot_core.tuning.adapters import TunedAdapter, plug_in

ENTRY = Path("studies/dvc.yaml")


def main() -> None:
    with run_stage("attack", file=ENTRY) as stage:
        params, artifacts, runtime, checkpoint = stage.params, stage.artifacts, stage.runtime, stage.checkpoint
        blocks, heldout = artifacts.blocks("train"), artifacts.blocks("heldout")
        prepare(blocks, runtime.device)  # all is measured with the kernels that attacks train with, also when resumed
        tokenizer, package = load_tokenizer(artifacts.model), Package(artifacts.emulator, links=True)
        owner = ModelOwner(
            artifacts.model, runtime, blocks, params, artifacts.harmonizers, checkpoint.folder, checkpoint
        )
        model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)

        def encoded(task: str, part: str) -> examples.Examples:
            rows = artifacts.questions(task, part)
            return examples.from_task(model, tokenizer, task, rows, block_size=params.data.block_size)

        members, others = ({task: encoded(task, part) for task in params.tasks} for part in ("train", "eval"))
        questions = {task: artifacts.questions(task, "eval") for task in params.tasks}
        yardstick = Yardstick(tokenizer, questions, others, params.evaluate.batch_size)

        def returned(task: str, kind: str) -> TunedAdapter:
            tuned = adapter.read(artifacts.adapter(task, kind) / "adapter", package, links=True)
            return fitted(tuned, package, model, artifacts.emulator_private)

        def served() -> PreTrainedModel:
            plugged = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
            plug_in(plugged, package.plan, returned(params.tasks[0], params.adapters[0]))
            return plugged

        def measured(known: PreTrainedModel, label: str) -> dict[str, Any]:
            return {"perplexity": math.exp(mean_loss(known, heldout)), **yardstick.measure(known, label)}

        def attacked(name: str, target: Target) -> dict[str, Any]:
            victim, label = target.load(), f"attack {name}"
            curve = restoration.restore(
                victim,
                blocks,
                heldout,
                params.attack,
                seed=params.seed,
                label=label,
                checkpoint=checkpoint.within(name),
                parameters=target.parameters(victim),
                loss=target.loss(victim),
            )
            return {"curve": curve, **yardstick.measure(victim, label)}

        shipped = package.load(runtime.device)
        before = {
            name: cached_json(checkpoint.folder / f"before-{name}.json", partial(measured, known, f"the {name}"))
            for name, known in (("model", model), ("package", shipped))
        }
        found = {
            name: cached_json(checkpoint.folder / f"{name}.json", partial(attacked, name, target))
            for name, target in targets(package, owner, served).items()
        }
        model_loss = math.log(before["model"]["perplexity"])
        curves = restoration.curves({name: result.pop("curve") for name, result in found.items()}, model_loss)
        weights = exposure.exposure(model, shipped, package.plan)
        records = slice(params.attack.membership_records)
        told = {
            task: {
                kind: membership.attack(
                    model, package.plan, returned(task, kind), members[task][records], others[task][records]
                )
                for kind in params.adapters
            }
            for task in params.tasks
        }
        channels = kept_channels(artifacts.emulator_private, package.sha256) if package.plan.cuts else {}
        difficulty = hidden.recovery_difficulty(  # last, since it changes the model
            model, shipped, package.plan, channels, heldout, params.seed
        )
        ends = {row["target"]: {**row, **found[row["target"]]} for row in curves}  # the last row stays
        floors = [(before, yardstick.uniform_guess(owner.config.vocab_size))]
        if "without_weights" in ends:  # with the same training
            floors.append((ends, ends["without_weights"]))
        for rows, floor in floors:
            for row in rows.values():
                row["above_floor"] = yardstick.above_floor(row, before["model"], floor)
        with atomic_folder(artifacts.root / "attack") as out:
            write_csv(out / "restoration.csv", curves)
            write_csv(out / "weights.csv", weights)
            write_json(out / "membership.json", told)
            write_json(out / "cost.json", stage.meter.read())
        write_json(
            Path("attack.json"),
            {
                "package": package.sha256,
                "before": before,
                "restoration": ends,
                "recovery_difficulty": difficulty,
                "weights": exposure.shares(weights),
                "membership": {
                    task: {
                        kind: {name: membership.without_curve(figures) for name, figures in each.items()}
                        for kind, each in kinds.items()
                    }
                    for task, kinds in told.items()
                },
            },
        )


if __name__ == "__main__":
    run_command(main)
