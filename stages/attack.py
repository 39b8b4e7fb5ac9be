"""Stage attack, off the main path: what an attacker makes of the package, and of the adapters that came back.

Reads everything, as only a study can. Each finished attack is kept until the stage ends, so that a stopped one goes on.
Its entry is in studies/dvc.yaml; `make attack` runs it.
"""

from functools import partial
from pathlib import Path
from typing import Any

from scaleot_core.attacks import exposure, membership, restoration
from scaleot_core.attacks.targets import Target, targets
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, cached_json, write_csv, write_json
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.exchange import adapter
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import fitted
from scaleot_core.methods import ModelOwner
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.pipeline import run_stage
from scaleot_core.tuning import examples

ENTRY = Path("studies/dvc.yaml")


def main() -> None:
    with run_stage("attack", file=ENTRY) as stage:
        params, artifacts, runtime, checkpoint = stage.params, stage.artifacts, stage.runtime, stage.checkpoint
        blocks, heldout = artifacts.blocks("train"), artifacts.blocks("heldout")
        questions = {task: artifacts.questions(task, "eval") for task in params.tasks}
        tokenizer, package = load_tokenizer(artifacts.model), Package(artifacts.emulator, links=True)
        batch_size, block_size = params.evaluate.batch_size, params.data.block_size
        owner = ModelOwner(
            artifacts.model, runtime, blocks, params, artifacts.harmonizers, checkpoint.folder, checkpoint
        )

        def attacked(name: str, target: Target) -> dict[str, Any]:
            victim, own, label = target(), checkpoint.within(name), f"attack {name}"
            curve = restoration.restore(
                victim, blocks, heldout, params.attack, seed=params.seed, label=label, checkpoint=own
            )
            return {
                "curve": curve,
                "tasks": evaluate(victim, tokenizer, questions, batch_size=batch_size, label=label),
            }

        found = {
            name: cached_json(checkpoint.folder / f"{name}.json", partial(attacked, name, target))
            for name, target in targets(package, owner).items()
        }
        model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
        model_loss = mean_loss(model, heldout)
        curves = restoration.curves({name: result["curve"] for name, result in found.items()}, model_loss)
        weights = exposure.exposure(model, package.load(runtime.device), package.plan)
        members: dict[str, dict[str, Any]] = {}
        for task in params.tasks:
            parts = [artifacts.questions(task, part) for part in ("train", "eval")]
            data = [examples.from_task(model, tokenizer, task, rows, block_size=block_size) for rows in parts]
            records = params.attack.membership_records
            for kind in params.adapters:
                tuned = adapter.read(artifacts.adapter(task, kind) / "adapter", package, links=True)
                tuned = fitted(tuned, package, model, artifacts.emulator_private)
                told = membership.attack(model, package.plan, tuned, *(part[:records] for part in data))
                members.setdefault(task, {})[kind] = told
        with atomic_folder(artifacts.root / "attack") as out:
            write_csv(out / "restoration.csv", curves)
            write_csv(out / "weights.csv", weights)
            write_json(out / "membership.json", members)
            write_json(out / "cost.json", stage.meter.read())
        ends = {row["target"]: {**row, "tasks": found[row["target"]]["tasks"]} for row in curves}  # the last row stays
        write_json(
            Path("attack.json"),
            {
                "package": package.sha256,
                "restoration": ends,
                "weights": exposure.shares(weights),
                "membership": {
                    task: {
                        kind: {name: membership.without_curve(figures) for name, figures in told.items()}
                        for kind, told in kinds.items()
                    }
                    for task, kinds in members.items()
                },
            },
        )


if __name__ == "__main__":
    run_command(main)
