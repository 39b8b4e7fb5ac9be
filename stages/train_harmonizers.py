"""Stage train_harmonizers: Dynamic LayerReplace, harmonizers and scores together.

Reads the model, the corpus and the prior; writes the final scores and harmonizers and the history of both, or, for a
method that needs none, that they are not needed.
"""

import torch

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, write_json
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression import dlr, layer_importance
from scaleot_core.models.streaming import load_sharded
from scaleot_core.pipeline import run_stage


def main() -> None:
    with run_stage("train_harmonizers") as stage:
        params, artifacts, runtime = stage.params, stage.artifacts, stage.runtime
        if params.method not in layer_importance.SCORED_METHODS:
            layer_importance.write_not_needed(artifacts.harmonizers, params.method)
            return
        model = load_sharded(artifacts.model, device=runtime.device, dtype=runtime.dtype)
        stage.meter.count(model)
        harmonizers = layer_importance.new_harmonizers(model.config, params.harmonizer.rank, params.seed).to(
            runtime.device
        )
        prior = torch.zeros(len(harmonizers))
        if params.dlr.init == "prior":
            scores = layer_importance.read_scores(artifacts.importance / "scores.json", len(harmonizers))
            prior = torch.tensor(scores, dtype=torch.float64)
            layer_importance.restore(harmonizers, artifacts.importance / "harmonizers.safetensors")
        final_scores, history = dlr.train(
            model,
            harmonizers,
            prior,
            artifacts.blocks("train"),
            params.dlr,
            seed=params.seed,
            checkpoint=stage.checkpoint,
        )
        with atomic_folder(artifacts.harmonizers) as out:
            write_tensors(out / "harmonizers.safetensors", harmonizers.state_dict())
            write_json(out / "scores.json", {"prior": prior.tolist(), "scores": final_scores.tolist()})
            write_json(out / "history.json", history)


if __name__ == "__main__":
    run_command(main)
