"""Stage compress: turn the model into the emulator by `method`, and write the package.

Reads the model, the corpus, the scores and the harmonizers; α and β, or a budget, decide. The package is all that the
data owner gets; what led to it is in emulator.private.json. Decompositions stay beside the checkpoints, for the next α
and β.
"""

from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, fingerprint, write_json
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression.plan import DECIDED_BY
from scaleot_core.exchange import package
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.loading import load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.cost import cost

MODEL, CORPUS, OUT = Path("artifacts/model"), Path("artifacts/corpus/train.safetensors"), Path("artifacts/emulator")
HARMONIZERS = Path("artifacts/harmonizers")


def main() -> None:
    params = load_params()
    runtime = setup(params, "compress")
    key = fingerprint(params.model_dump(), MODEL, CORPUS, HARMONIZERS)
    checkpoint = Checkpoint(scratch_dir(f"compress-{key}"), params.checkpoint_seconds)
    with cost(Path("costs/compress.json"), runtime) as meter:
        blocks = read_tensors(CORPUS)["blocks"]
        owner = ModelOwner(
            MODEL, runtime, blocks, params, HARMONIZERS, scratch_dir("decompositions"), checkpoint, meter.count
        )
        private = {"scores": owner.scores(), "params": params.model_dump(include=DECIDED_BY)}
        made = METHODS[params.method](owner)
        with atomic_folder(OUT) as out:
            package.save(out, owner.config, load_tokenizer(MODEL), made.plan, made.tensors)
        write_json(OUT.with_name(f"{OUT.name}.private.json"), private)
    checkpoint.remove()


if __name__ == "__main__":
    run_command(main)
