"""Stage attack, off the main path: what an attacker makes of the package, and of the adapters that came back.

Reads everything, as only a study can. Each finished attack is kept until the stage ends, so that a stopped one goes on.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from scaleot_core import adapter, emulator, examples, handover, package
from scaleot_core.attacks import exposure, membership, recovery
from scaleot_core.attacks.targets import Target, targets
from scaleot_core.ending import ends_in_one_line
from scaleot_core.evaluation import evaluate
from scaleot_core.files import fingerprint, once, read_jsonl, read_tensors, whole_folder, write_json
from scaleot_core.methods import Owner
from scaleot_core.models import load_model, load_tokenizer, mean_loss
from scaleot_core.params import load_params
from scaleot_core.report import write_csv
from scaleot_core.runtime import cost, setup
from scaleot_core.training import Checkpoint, scratch

ARTIFACTS, OUT = Path("artifacts"), Path("artifacts/attack")
MODEL, PACKAGE = ARTIFACTS / "model", ARTIFACTS / "emulator"


def main() -> None:
    params = load_params()
    runtime = setup(params, "attack")
    inputs = [ARTIFACTS / name for name in ("model", "emulator", "adapters", "tasks", "corpus", "harmonizers")]
    checkpoint = Checkpoint(scratch(f"attack-{fingerprint(params.model_dump(), *inputs)}"), params.checkpoint_seconds)
    blocks, heldout = (
        read_tensors(ARTIFACTS / "corpus" / f"{part}.safetensors")["blocks"] for part in ("train", "heldout")
    )
    rows = {
        task: [read_jsonl(ARTIFACTS / "tasks" / task / f"{part}.jsonl") for part in ("train", "eval")]
        for task in params.tasks
    }
    tokenizer = load_tokenizer(MODEL)
    batch, size = params.evaluate.batch_size, params.data.block_size
    owner = Owner(MODEL, runtime, blocks, params, ARTIFACTS / "harmonizers", checkpoint.folder, checkpoint)

    def attacked(name: str, target: Target) -> dict[str, Any]:
        victim, own, label = target(), checkpoint.within(name), f"attack {name}"
        curve = recovery.recover(victim, blocks, heldout, params.attack, seed=params.seed, label=label, checkpoint=own)
        questions = {task: asked for task, (_, asked) in rows.items()}
        return {"curve": curve, "tasks": evaluate(victim, tokenizer, questions, batch_size=batch, label=label)}

    with cost(ARTIFACTS / "attack.cost.json", runtime):
        found = {
            name: once(checkpoint.folder / f"{name}.json", partial(attacked, name, target))
            for name, target in targets(PACKAGE, owner).items()
        }
        model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
        shipped, plan = package.load(PACKAGE, device=runtime.device)
        curves = recovery.curves({name: result["curve"] for name, result in found.items()}, mean_loss(model, heldout))
        weights = exposure.exposure(model, shipped, plan)
        originals, identity = emulator.layer_parameters(shipped, plan, "adapter"), handover.identity(PACKAGE)
        members = {}
        for task in params.tasks:
            folder = ARTIFACTS / "adapters" / task / "adapter"
            tuned = adapter.read(folder, shipped, plan, originals, package=identity)
            data = [examples.from_task(model, tokenizer, task, part, block_size=size) for part in rows[task]]
            members[task] = membership.attack(model, plan, tuned, *(part[: params.attack.records] for part in data))
        with whole_folder(OUT) as out:
            write_csv(out / "recovery.csv", list(curves[0]), (list(row.values()) for row in curves))
            write_csv(out / "weights.csv", list(weights[0]), (list(row.values()) for row in weights))
            write_json(out / "membership.json", members)
    ends = {row["target"]: {**row, "tasks": found[row["target"]]["tasks"]} for row in curves}  # the last row stays
    told = {task: {name: membership.told(figures) for name, figures in each.items()} for task, each in members.items()}
    write_json(
        Path("attack.json"),
        {"package": identity, "recovery": ends, "weights": exposure.shares(weights), "membership": told},
    )
    shutil.rmtree(checkpoint.folder)


if __name__ == "__main__":
    ends_in_one_line(main)
