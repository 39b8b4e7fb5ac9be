"""Stage sources: fingerprint what the user brings and the kind of machine. Runs at every `dvc repro`.

A changed model, question or corpus of one's own is noticed by it, and so is a machine that gives other bytes.
"""

from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_json
from scaleot_core.common.machine import machine_kind
from scaleot_core.data.fingerprints import source_fingerprints
from scaleot_core.params import load_params

OUT = Path("artifacts")


def main() -> None:
    params = load_params()
    write_json(OUT / "sources.json", source_fingerprints(params))
    write_json(OUT / "machine.json", machine_kind(params.device))


if __name__ == "__main__":
    run_command(main)
