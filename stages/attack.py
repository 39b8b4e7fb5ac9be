"""Stage attack, off the main path: what an attacker makes of the package, and of the adapters that came back.

Reads everything, as only a study can. Each finished attack is kept until the stage ends, so that a stopped one goes on.
Its entry is in studies/dvc.yaml; `make attack` runs it.
"""

from pathlib import Path

from scaleot_core.attacks.outcome import Attacks
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, write_csv, write_json
from scaleot_core.pipeline import run_stage

ENTRY = Path("studies/dvc.yaml")


def main() -> None:
    with run_stage("attack", file=ENTRY) as stage:
        found = Attacks(stage.artifacts, stage.params, stage.runtime, stage.checkpoint).run()
        with atomic_folder(stage.artifacts.root / "attack") as out:
            write_csv(out / "restoration.csv", found.curves)
            write_csv(out / "weights.csv", found.weights)
            write_json(out / "membership.json", found.membership)
            write_json(out / "cost.json", stage.meter.read())
        write_json(Path("attack.json"), found.summary)


if __name__ == "__main__":
    run_command(main)
