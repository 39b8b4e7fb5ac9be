"""Stage sources: fingerprint what the user brings, so that an edit of it is noticed. Runs at every `dvc repro`."""

from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_json
from scaleot_core.data.fingerprints import source_fingerprints
from scaleot_core.params import load_params

OUT = Path("artifacts/sources.json")


def main() -> None:
    write_json(OUT, source_fingerprints(load_params()))


if __name__ == "__main__":
    run_command(main)
