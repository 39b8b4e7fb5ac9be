"""Stage offsite_tune, one per task: tune the adapter layers on private questions against the frozen emulator.

The data owner's side. Reads the emulator package and the task's training questions and nothing else; writes the tuned
adapter layers, which is all that goes back. `python stages/offsite_tune.py TASK` runs one.
"""

from pathlib import Path

from _stage import named_task

from scaleot_core.common import distributed
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, fingerprint, read_jsonl, write_json
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression import emulator
from scaleot_core.exchange import adapter, package
from scaleot_core.exchange.manifest import manifest_sha256
from scaleot_core.exchange.tokenizer import load_untrusted_tokenizer
from scaleot_core.models.families import decoder_layers
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.cost import cost
from scaleot_core.tuning import examples
from scaleot_core.tuning.selection import tune

EMULATOR = Path("artifacts/emulator")


def main() -> None:
    params = load_params()
    task = named_task(params)
    private = Path("artifacts/tasks") / task / "train.jsonl"
    runtime = setup(params, f"offsite_tune@{task}")
    key = fingerprint(params.tuning.model_dump(), params.data.block_size, params.seed, params.dtype, EMULATOR, private)
    checkpoint = Checkpoint(scratch_dir(f"offsite_tune-{task}-{key}"), params.checkpoint_seconds)
    with cost(Path(f"costs/offsite_tune-{task}.json"), runtime) as meter:
        model, plan = package.load(EMULATOR, device=runtime.device)
        meter.count(model)
        size, rows = params.data.block_size, read_jsonl(private)
        packed = not params.tuning.epsilon  # else a record is no longer one example
        tokenizer = load_untrusted_tokenizer(EMULATOR)
        data = examples.from_task(model, tokenizer, task, rows, block_size=size, packed=packed)
        if not params.tuning.epsilon:  # which has every process take all records one by one
            distributed.shard_layers(decoder_layers(model))
        parameters = adapter.trainable(model, plan, params.tuning, params.seed)
        beside = emulator.layer_parameters(model, plan, "harmonizer") if params.tuning.harmonizers == "tuned" else {}
        label, tuning = f"offsite_tune@{task}", params.tuning
        tuned = tune(model, parameters | beside, data, tuning, seed=params.seed, label=label, checkpoint=checkpoint)
        with atomic_folder(Path("artifacts/adapters") / task) as out:
            (out / "adapter").mkdir()
            identity = manifest_sha256(EMULATOR)
            adapter.save(out / "adapter", model, plan, parameters, package=identity, tuning=tuning, tuned=tuned)
            if beside:  # stays with the data owner; only the measurement of the tuned emulator reads it
                write_tensors(out / "harmonizers.safetensors", beside)
            write_json(out / "tuning.json", {"lr": tuned.lr, "validation_loss": tuned.validation_loss})
            write_json(out / "history.json", tuned.history)
    checkpoint.remove()


if __name__ == "__main__":
    run_command(main)
