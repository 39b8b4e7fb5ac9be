"""Stage attack, off the main path: what an attacker makes of the package, and of the adapters that came back.

Reads everything, as only a study can. Each finished attack is kept until the stage ends, so that a stopped one goes on.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from scaleot_core.attacks import exposure, membership, restoration
from scaleot_core.attacks.targets import Target, targets
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, cached_json, fingerprint, read_jsonl, write_csv, write_json
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression import emulator
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.exchange import adapter, package
from scaleot_core.exchange.manifest import manifest_sha256
from scaleot_core.methods import ModelOwner
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.cost import cost
from scaleot_core.tuning import examples

ARTIFACTS, OUT = Path("artifacts"), Path("artifacts/attack")
MODEL, PACKAGE = ARTIFACTS / "model", ARTIFACTS / "emulator"


def main() -> None:
    params = load_params()
    runtime = setup(params, "attack")
    inputs = [ARTIFACTS / name for name in ("model", "emulator", "adapters", "tasks", "corpus", "harmonizers")]
    checkpoint = Checkpoint(
        scratch_dir(f"attack-{fingerprint(params.model_dump(), *inputs)}"), params.checkpoint_seconds
    )
    blocks, heldout = (
        read_tensors(ARTIFACTS / "corpus" / f"{part}.safetensors")["blocks"] for part in ("train", "heldout")
    )
    rows = {
        task: [read_jsonl(ARTIFACTS / "tasks" / task / f"{part}.jsonl") for part in ("train", "eval")]
        for task in params.tasks
    }
    tokenizer = load_tokenizer(MODEL)
    batch, size = params.evaluate.batch_size, params.data.block_size
    owner = ModelOwner(MODEL, runtime, blocks, params, ARTIFACTS / "harmonizers", checkpoint.folder, checkpoint)

    def attacked(name: str, target: Target) -> dict[str, Any]:
        victim, own, label = target(), checkpoint.within(name), f"attack {name}"
        curve = restoration.restore(
            victim, blocks, heldout, params.attack, seed=params.seed, label=label, checkpoint=own
        )
        questions = {task: asked for task, (_, asked) in rows.items()}
        return {"curve": curve, "tasks": evaluate(victim, tokenizer, questions, batch_size=batch, label=label)}

    with cost(ARTIFACTS / "attack.cost.json", runtime):
        found = {
            name: cached_json(checkpoint.folder / f"{name}.json", partial(attacked, name, target))
            for name, target in targets(PACKAGE, owner).items()
        }
        model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
        shipped, plan = package.load(PACKAGE, device=runtime.device)
        curves = restoration.curves(
            {name: result["curve"] for name, result in found.items()}, mean_loss(model, heldout)
        )
        weights = exposure.exposure(model, shipped, plan)
        originals, identity = emulator.layer_parameters(shipped, plan, "adapter"), manifest_sha256(PACKAGE)
        members = {}
        for task in params.tasks:
            folder = ARTIFACTS / "adapters" / task / "adapter"
            tuned = adapter.read(folder, shipped, plan, originals, package=identity)
            data = [examples.from_task(model, tokenizer, task, part, block_size=size) for part in rows[task]]
            members[task] = membership.attack(model, plan, tuned, *(part[: params.attack.records] for part in data))
        with atomic_folder(OUT) as out:
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
    run_command(main)
