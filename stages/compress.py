"""Stage compress: turn the model into the emulator by `method`, and write the package.

Reads the model, the corpus, the scores and the harmonizers; α and β, or a budget, decide. The package is all that the
data owner gets; what led to it is in emulator.private.json. Decompositions stay beside the checkpoints, for the next α
and β.
"""

from pathlib import Path

from scaleot_core import package
from scaleot_core.ending import ends_in_one_line
from scaleot_core.files import fingerprint, read_tensors, whole_folder, write_json
from scaleot_core.methods import METHODS, Owner
from scaleot_core.models import load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.plan import DECIDED_BY
from scaleot_core.runtime import cost, setup
from scaleot_core.training import Checkpoint, scratch

MODEL, CORPUS, OUT = Path("artifacts/model"), Path("artifacts/corpus/train.safetensors"), Path("artifacts/emulator")
HARMONIZERS = Path("artifacts/harmonizers")


def main() -> None:
    params = load_params()
    runtime = setup(params, "compress")
    key = fingerprint(params.model_dump(), MODEL, CORPUS, HARMONIZERS)
    checkpoint = Checkpoint(scratch(f"compress-{key}"), params.checkpoint_seconds)
    with cost(Path("costs/compress.json"), runtime) as meter:
        blocks = read_tensors(CORPUS)["blocks"]
        owner = Owner(MODEL, runtime, blocks, params, HARMONIZERS, scratch("decompositions"), checkpoint, meter.count)
        private = {"scores": owner.scores(), "params": params.model_dump(include=DECIDED_BY)}
        made = METHODS[params.method](owner)
        with whole_folder(OUT) as out:
            package.save(out, owner.config, load_tokenizer(MODEL), made.plan, made.tensors)
        write_json(OUT.with_name(f"{OUT.name}.private.json"), private)
    checkpoint.remove()


if __name__ == "__main__":
    ends_in_one_line(main)
