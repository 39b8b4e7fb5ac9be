"""Stage compress: choose adapter layers, harmonizers and compressed layers, and write the emulator package.

Reads the model, the corpus, the scores and the harmonizers; α, β and adapter_layers decide. With `dlr.after_src` the
harmonizers are trained once more, in the finished emulator. What it writes is all that the data owner gets.
Decompositions stay beside the checkpoints, for the next α and β.
"""

from pathlib import Path

from scaleot_core import decomposition, dlr, emulator, importance
from scaleot_core.ending import ends_in_one_line
from scaleot_core.files import fingerprint, read_tensors, whole_folder, write_tensors
from scaleot_core.models import load_model, load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.progress import say
from scaleot_core.runtime import cost, setup
from scaleot_core.training import Checkpoint, scratch

MODEL, CORPUS, OUT = Path("artifacts/model"), Path("artifacts/corpus/train.safetensors"), Path("artifacts/emulator")
HARMONIZERS = Path("artifacts/harmonizers")


def main() -> None:
    params = load_params()
    runtime = setup(params, "compress")
    kept = scratch("decompositions")
    key = fingerprint(params.model_dump(), MODEL, CORPUS, HARMONIZERS)
    checkpoint = Checkpoint(scratch(f"compress-{key}"), params.checkpoint_seconds)
    with cost(Path("costs/compress.json"), runtime):
        model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
        harmonizers = importance.new_harmonizers(model, params.harmonizer, params.seed)
        importance.restore(harmonizers, HARMONIZERS / "harmonizers.safetensors")
        plan = emulator.plan(params, importance.read_scores(HARMONIZERS / "scores.json", len(harmonizers)))
        if not plan.layers("compressed"):
            say(f"alpha = {params.alpha} leaves no layer to compress, so beta = {params.beta} does nothing", "yellow")
        covariances = None
        if params.src.whiten:
            file = kept / f"inputs-{fingerprint(params.src.calibration_blocks, MODEL, CORPUS)}.safetensors"
            if not file.exists():
                blocks = read_tensors(CORPUS)["blocks"][: params.src.calibration_blocks]
                write_tensors(file, decomposition.input_covariances(model, blocks))
            covariances = read_tensors(file)
        emulator.build(model, harmonizers, plan, decomposition.cached(kept, covariances))
        if params.dlr.after_src and plan.layers("harmonizer"):
            trained = emulator.layer_parameters(model, plan, "harmonizer")
            blocks = read_tensors(CORPUS)["blocks"]
            dlr.make_up(model, trained, blocks, params.dlr, seed=params.seed, checkpoint=checkpoint)
        with whole_folder(OUT) as out:
            emulator.save(out, model, load_tokenizer(MODEL), plan)
    checkpoint.remove()


if __name__ == "__main__":
    ends_in_one_line(main)
