"""Stage attack, off the main path: what an attacker makes of the package, and of the adapters that came back.

Reads everything, as only a study can. Each finished attack is kept until the stage ends, so that a stopped one goes on;
the untouched model's figures are kept for the next package. Its entry is in studies/dvc.yaml; `make attack` runs it.
"""

from pathlib import Path

from scaleot_core.attacks.outcome import Attacks
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, fingerprint, write_csv, write_json
from scaleot_core.pipeline import Stage, run_stage
from scaleot_core.training.checkpoint import scratch_dir

ENTRY = Path("studies/dvc.yaml")


def untouched(stage: Stage) -> Path:
    """Return the folder of the untouched model's figures, named by all that they depend on: no package, no attacker."""
    artifacts, params = stage.artifacts, stage.params
    package = {artifacts.emulator, artifacts.emulator_private, artifacts.harmonizers, artifacts.root / "adapters"}
    asked = params.attack.model_dump(include={"eval_questions", "membership_records"})
    read = (dep for dep in stage.entry.deps if dep not in package)
    settings = (params.tasks, params.dtype, params.evaluate.model_dump(), params.data.block_size, asked)
    return scratch_dir(f"untouched-{fingerprint(*settings, str(stage.runtime.device), *read)}")


def main() -> None:
    with run_stage("attack", file=ENTRY) as stage:
        outcome = Attacks(stage.artifacts, stage.params, stage.runtime, stage.checkpoint, untouched(stage)).run()
        with atomic_folder(stage.artifacts.root / "attack") as out:
            write_csv(out / "restoration.csv", outcome.curves)
            write_csv(out / "weights.csv", outcome.weights)
        write_json(Path("attack.json"), outcome.summary)


if __name__ == "__main__":
    run_command(main)
