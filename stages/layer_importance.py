"""Stage layer_importance: fit every harmonizer to its own layer and measure what losing that layer costs.

Reads the model and the corpus; writes prior scores and fitted harmonizers, or, for a method that needs none, that they
are not needed. `dvc repro layer_importance` runs it.
"""

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, write_json
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression import layer_importance
from scaleot_core.compression.local_fit import fit_locally
from scaleot_core.models.loading import load_model, read_config
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.pipeline import run_stage


def main() -> None:
    with run_stage("layer_importance") as stage:
        params, artifacts, runtime = stage.params, stage.artifacts, stage.runtime
        if params.method not in layer_importance.SCORED_METHODS:
            layer_importance.write_not_needed(artifacts.importance, params.method)
            return
        fits, blocks = params.layer_importance, artifacts.blocks("train")
        config = read_config(artifacts.model)
        streamed = StreamedModel(artifacts.model, config, device=runtime.device, dtype=runtime.dtype)
        stage.meter.count(streamed.model)
        harmonizers = layer_importance.new_harmonizers(config, params.harmonizer.rank, params.seed).to(runtime.device)
        history = fit_locally(
            streamed,
            harmonizers,
            blocks[: fits.calibration_blocks],
            steps=fits.steps,
            lr=fits.lr,
            seed=params.seed,
            checkpoint=stage.checkpoint,
        )
        model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
        stage.meter.count(model)
        costs = layer_importance.estimate(fits.estimator, model, harmonizers, blocks[-fits.sensitivity_blocks :])
        scores = {
            "estimator": fits.estimator,
            "costs": costs,
            "scores": layer_importance.prior_scores(costs),
        }
        with atomic_folder(artifacts.importance) as out:
            write_tensors(out / "harmonizers.safetensors", harmonizers.state_dict())
            write_json(out / "scores.json", scores)
            write_json(out / "history.json", history)


if __name__ == "__main__":
    run_command(main)
