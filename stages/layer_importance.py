"""Stage layer_importance: fit every harmonizer to its own layer and measure what losing that layer costs.

Reads the model and the corpus; writes prior scores and fitted harmonizers. `dvc repro layer_importance` runs it.
"""

from pathlib import Path

from scaleot_core import importance
from scaleot_core.ending import ends_in_one_line
from scaleot_core.files import fingerprint, read_tensors, whole_folder, write_json, write_tensors
from scaleot_core.models import load_model, mean_loss
from scaleot_core.params import load_params
from scaleot_core.runtime import cost, setup
from scaleot_core.training import Checkpoint, scratch

MODEL, CORPUS, OUT = Path("artifacts/model"), Path("artifacts/corpus"), Path("artifacts/importance")


def main() -> None:
    params = load_params()
    settings = params.layer_importance
    runtime = setup(params, "layer_importance")
    key = fingerprint(settings.model_dump(), params.harmonizer.model_dump(), params.seed, params.dtype, MODEL, CORPUS)
    checkpoint = Checkpoint(scratch(f"layer_importance-{key}"), params.checkpoint_seconds)
    with cost(Path("costs/layer_importance.json"), runtime) as meter:
        model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
        meter.count(model)
        blocks = read_tensors(CORPUS / "train.safetensors")["blocks"]
        harmonizers = importance.new_harmonizers(model, params.harmonizer, params.seed)
        history = importance.fit_locally(
            model,
            harmonizers,
            blocks[: settings.calibration_blocks],
            steps=settings.steps,
            batch_tokens=settings.batch_tokens,
            lr=settings.lr,
            seed=params.seed,
            checkpoint=checkpoint,
        )
        probe = blocks[-settings.sensitivity_blocks :]
        costs = importance.estimate(settings.estimator, model, harmonizers, probe)
        heldout = read_tensors(CORPUS / "heldout.safetensors")["blocks"]
        with whole_folder(OUT) as out:
            write_tensors(out / "harmonizers.safetensors", harmonizers.state_dict())
            write_json(
                out / "scores.json",
                {
                    "estimator": settings.estimator,
                    "costs": costs,
                    "scores": importance.prior_scores(costs),
                    "model_heldout_loss": mean_loss(model, heldout),
                },
            )
            write_json(out / "history.json", history)
    checkpoint.remove()


if __name__ == "__main__":
    ends_in_one_line(main)
