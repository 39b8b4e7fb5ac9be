"""Stage layer_importance: fit every harmonizer to its own layer and measure what losing that layer costs.

Reads the model and the corpus; writes prior scores and fitted harmonizers. `dvc repro layer_importance` runs it.
"""

from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, fingerprint, write_json
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression import layer_importance
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.cost import cost

MODEL, CORPUS, OUT = Path("artifacts/model"), Path("artifacts/corpus"), Path("artifacts/importance")


def main() -> None:
    params = load_params()
    settings = params.layer_importance
    runtime = setup(params, "layer_importance")
    key = fingerprint(settings.model_dump(), params.harmonizer.model_dump(), params.seed, params.dtype, MODEL, CORPUS)
    checkpoint = Checkpoint(scratch_dir(f"layer_importance-{key}"), params.checkpoint_seconds)
    with cost(Path("costs/layer_importance.json"), runtime) as meter:
        model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
        meter.count(model)
        blocks = read_tensors(CORPUS / "train.safetensors")["blocks"]
        harmonizers = layer_importance.new_harmonizers(model, params.harmonizer, params.seed)
        history = layer_importance.fit_locally(
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
        costs = layer_importance.estimate(settings.estimator, model, harmonizers, probe)
        heldout = read_tensors(CORPUS / "heldout.safetensors")["blocks"]
        with atomic_folder(OUT) as out:
            write_tensors(out / "harmonizers.safetensors", harmonizers.state_dict())
            write_json(
                out / "scores.json",
                {
                    "estimator": settings.estimator,
                    "costs": costs,
                    "scores": layer_importance.prior_scores(costs),
                    "model_heldout_loss": mean_loss(model, heldout),
                },
            )
            write_json(out / "history.json", history)
    checkpoint.remove()


if __name__ == "__main__":
    run_command(main)
