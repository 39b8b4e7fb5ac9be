"""Stage train_harmonizers: Dynamic LayerReplace, harmonizers and scores together.

Reads the model, the corpus and the prior; writes the final scores and harmonizers and the history of both.
"""

from pathlib import Path

import torch

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, fingerprint, write_json
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression import dlr, layer_importance
from scaleot_core.models.streaming import load_sharded
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.cost import cost

MODEL, CORPUS, OUT = Path("artifacts/model"), Path("artifacts/corpus"), Path("artifacts/harmonizers")
PRIOR = Path("artifacts/importance")


def main() -> None:
    params = load_params()
    runtime = setup(params, "train_harmonizers")
    form = params.harmonizer
    settings = params.dlr.model_dump(exclude={"after_src"})
    key = fingerprint(settings, form.model_dump(), params.seed, params.dtype, MODEL, CORPUS, PRIOR)
    checkpoint = Checkpoint(scratch_dir(f"train_harmonizers-{key}"), params.checkpoint_seconds)
    with cost(Path("costs/train_harmonizers.json"), runtime) as meter:
        model = load_sharded(MODEL, device=runtime.device, dtype=runtime.dtype)
        meter.count(model)
        harmonizers = layer_importance.new_harmonizers(model, form, params.seed)
        prior = torch.zeros(len(harmonizers))
        if params.dlr.init == "prior":
            prior = torch.tensor(
                layer_importance.read_scores(PRIOR / "scores.json", len(harmonizers)), dtype=torch.float64
            )
            layer_importance.restore(harmonizers, PRIOR / "harmonizers.safetensors")
        scores, history = dlr.train(
            model,
            harmonizers,
            prior,
            read_tensors(CORPUS / "train.safetensors")["blocks"],
            params.dlr,
            seed=params.seed,
            checkpoint=checkpoint,
        )
        with atomic_folder(OUT) as out:
            write_tensors(out / "harmonizers.safetensors", harmonizers.state_dict())
            write_json(out / "scores.json", {"prior": prior.tolist(), "scores": scores.tolist()})
            write_json(out / "history.json", history)
    checkpoint.remove()


if __name__ == "__main__":
    run_command(main)
