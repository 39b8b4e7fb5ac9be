"""Stage attack, off the main path: what an attacker makes of the package, and of the adapters that came back.

Reads everything, as only a study can. Each finished attack is kept until the stage ends, so that a stopped one goes on;
what the untouched model has is kept for the next package. Its entry is in studies/dvc.yaml; `make attack` runs it.
"""

from pathlib import Path

from scaleot_core.attacks.outcome import Attacks
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, fingerprint, write_csv, write_json
from scaleot_core.pipeline import Stage, run_stage
from scaleot_core.training.checkpoint import scratch_dir

ENTRY = Path("studies/dvc.yaml")


def untouched(stage: Stage) -> Path:
    """Give the folder of what the untouched model has, by all that this hangs on: no package, and no attacker."""
    artifacts, params = stage.artifacts, stage.params
    package = {artifacts.emulator, artifacts.emulator_private, artifacts.harmonizers, artifacts.root / "adapters"}
    asked = params.attack.model_dump(include={"eval_questions", "membership_records"})
    read = (dep for dep in stage.entry.deps if dep not in package)
    known = (params.tasks, params.dtype, params.evaluate.model_dump(), params.data.block_size, asked)
    return scratch_dir(f"untouched-{fingerprint(*known, str(stage.runtime.device), *read)}")


def main() -> None:
    with run_stage("attack", file=ENTRY) as stage:
        found = Attacks(stage.artifacts, stage.params, stage.runtime, stage.checkpoint, untouched(stage)).run()
        with atomic_folder(stage.artifacts.root / "attack") as out:
            write_csv(out / "restoration.csv", found.curves)
            write_csv(out / "weights.csv", found.weights)
            write_json(out / "membership.json", found.membership)
        write_json(Path("attack.json"), found.summary)


if __name__ == "__main__":
    run_command(main)
