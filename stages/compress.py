"""Stage compress: choose adapter layers, harmonizers and compressed layers, and write the emulator package.

Reads the model, the scores and the harmonizers; α, β and adapter_layers decide. What it writes is all that the data
owner gets.
"""

from pathlib import Path

from scaleot_core import emulator, importance
from scaleot_core.files import read_json, whole_folder
from scaleot_core.models import load_model, load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.runtime import cost, run_stage, setup

MODEL, HARMONIZERS, OUT = Path("artifacts/model"), Path("artifacts/harmonizers"), Path("artifacts/emulator")


def main() -> None:
    params = load_params()
    runtime = setup(params, "compress")
    with cost(Path("costs/compress.json"), runtime):
        kinds = emulator.choose_layers(
            read_json(HARMONIZERS / "scores.json")["scores"],
            adapter_layers=params.adapter_layers,
            alpha=params.alpha,
            placement=params.adapter_placement,
        )
        plan = emulator.Plan(kinds, params.beta, params.rank_semantics, params.harmonizer.rank)
        model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
        harmonizers = importance.new_harmonizers(model, params.harmonizer.rank, params.seed)
        importance.restore(harmonizers, HARMONIZERS / "harmonizers.safetensors")
        ranks = emulator.build(model, harmonizers, plan)
        with whole_folder(OUT) as out:
            emulator.save(out, model, load_tokenizer(MODEL), plan, ranks)


if __name__ == "__main__":
    run_stage(main)
