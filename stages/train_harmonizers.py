"""Stage train_harmonizers: Dynamic LayerReplace, harmonizers and scores together.

Reads the model, the corpus and the prior; writes the final scores and harmonizers and the history of both.
"""

from pathlib import Path

import torch

from scaleot_core import dlr, importance
from scaleot_core.ending import ends_in_one_line
from scaleot_core.files import fingerprint, read_tensors, whole_folder, write_json, write_tensors
from scaleot_core.params import load_params
from scaleot_core.runtime import cost, setup
from scaleot_core.streaming import load_split
from scaleot_core.training import Checkpoint, scratch

MODEL, CORPUS, OUT = Path("artifacts/model"), Path("artifacts/corpus"), Path("artifacts/harmonizers")
PRIOR = Path("artifacts/importance")


def main() -> None:
    params = load_params()
    runtime = setup(params, "train_harmonizers")
    form = params.harmonizer
    settings = params.dlr.model_dump(exclude={"after_src"})
    key = fingerprint(settings, form.model_dump(), params.seed, params.dtype, MODEL, CORPUS, PRIOR)
    checkpoint = Checkpoint(scratch(f"train_harmonizers-{key}"), params.checkpoint_seconds)
    with cost(Path("costs/train_harmonizers.json"), runtime) as meter:
        model = load_split(MODEL, device=runtime.device, dtype=runtime.dtype)
        meter.count(model)
        harmonizers = importance.new_harmonizers(model, form, params.seed)
        prior = torch.zeros(len(harmonizers))
        if params.dlr.init == "prior":
            prior = torch.tensor(importance.read_scores(PRIOR / "scores.json", len(harmonizers)), dtype=torch.float64)
            importance.restore(harmonizers, PRIOR / "harmonizers.safetensors")
        scores, history = dlr.train(
            model,
            harmonizers,
            prior,
            read_tensors(CORPUS / "train.safetensors")["blocks"],
            params.dlr,
            seed=params.seed,
            checkpoint=checkpoint,
        )
        with whole_folder(OUT) as out:
            write_tensors(out / "harmonizers.safetensors", harmonizers.state_dict())
            write_json(out / "scores.json", {"prior": prior.tolist(), "scores": scores.tolist()})
            write_json(out / "history.json", history)
    checkpoint.remove()


if __name__ == "__main__":
    ends_in_one_line(main)
