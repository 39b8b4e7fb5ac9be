"""Stage offsite_tune, one per task and kind of adapters: tune them on private questions in the frozen emulator.

The data owner's side. Reads the emulator package and the task's training questions and nothing else; writes the tuned
adapter, which is all that goes back. `python stages/offsite_tune.py TASK layers|lora` runs one.
"""

from scaleot_core.common import distributed
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, write_json
from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import decoder_layers
from scaleot_core.pipeline import item_from_arguments, run_stage
from scaleot_core.tuning import examples
from scaleot_core.tuning.adapters import trainable
from scaleot_core.tuning.selection import tune


def main() -> None:
    item = item_from_arguments("offsite_tune")
    with run_stage("offsite_tune", item) as stage:
        task, kind, artifacts, params = item["task"], item["adapters"], stage.artifacts, stage.params
        tuning, block_size, seed = params.offsite_tune, params.data.block_size, params.seed
        lora = params.lora.form if kind == "lora" else None
        if lora:
            tuning = tuning.model_copy(update={"lr": params.lora.lr})
        package = Package(artifacts.emulator, links=True)
        model = package.load(stage.runtime.device)
        stage.meter.count(model)
        rows, packed = artifacts.questions(task, "train"), not tuning.epsilon  # packed, a record is no example
        data = examples.from_task(model, package.tokenizer(), task, rows, block_size=block_size, packed=packed)
        if not tuning.epsilon:  # which has every process take all records one by one
            distributed.shard_layers(decoder_layers(model))
        parameters = trainable(model, package.plan, lora, seed)
        tuned = tune(model, parameters, data, tuning, seed=seed, label=stage.label, checkpoint=stage.checkpoint)
        with atomic_folder(artifacts.adapter(task, kind)) as out:
            (out / "adapter").mkdir()
            adapter_folder.save(out / "adapter", package, parameters, lora=lora, tuning=tuning, tuned=tuned)
            write_json(out / "tuning.json", {"lr": tuned.lr, "validation_loss": tuned.validation_loss})
            write_json(out / "history.json", tuned.history)


if __name__ == "__main__":
    run_command(main)
