"""Stage compress: build the emulator by `method`, and write the package.

Reads the model, the corpus, the scores and the harmonizers; α and β, or `max_bytes_ratio`, decide. The package is all
that the data owner gets; what led to it is in emulator.private.json. Decompositions are kept beside the checkpoints for
the next α and β, as long as no code that the stage depends on changes.
"""

from dataclasses import replace
from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_folder, write_json
from scaleot_core.common.launch import is_main_process
from scaleot_core.compression.layer_importance import SCORED_METHODS
from scaleot_core.exchange import package
from scaleot_core.exchange.ledger import channels_left, exact_weights, model_fingerprint, read_left
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.loading import load_tokenizer
from scaleot_core.pipeline import run_stage


def main() -> None:
    with run_stage("compress") as stage:
        artifacts, params = stage.artifacts, stage.params
        owner = ModelOwner(
            folder=artifacts.model,
            runtime=stage.runtime,
            blocks=artifacts.blocks("train"),
            params=params,
            harmonizers=artifacts.harmonizers,
            scratch=stage.kept("decompositions"),
            checkpoint=stage.checkpoint,
            count=stage.meter.count,
        )
        if params.channels.within:
            left = read_left(Path(params.channels.within), model_fingerprint(artifacts.model))
            if left is None:
                raise UserError(
                    "no package of this model is in it; name another",
                    parameter="channels.within",
                    value=params.channels.within,
                )
            owner = replace(owner, within=channels_left(left, owner.config, owner.shapes.channels))
        built = METHODS[params.method](owner)
        if not is_main_process():
            for _ in built.tensors:  # split ones are put together by all processes
                pass
            return
        with atomic_folder(artifacts.emulator) as out:
            package.save(out, owner.config, load_tokenizer(artifacts.model), built.plan, built.tensors)
        emulator = package.Package(artifacts.emulator)
        private = {
            "package": emulator.sha256,
            "exact": exact_weights(emulator, owner.stream(), built.channels).model_dump(),
            "scores": owner.scores() if params.method in SCORED_METHODS else [],
            "params": stage.entry.values(params),
            "channels": {str(i): kept.tolist() for i, kept in built.channels.items()},
        }
        write_json(artifacts.emulator_private, private, private=True)


if __name__ == "__main__":
    run_command(main)
