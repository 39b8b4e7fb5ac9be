"""Stage full_finetune, one per task: all weights of the real model tuned, the ceiling. α and β don't touch it."""

from functools import partial
from pathlib import Path

from _stage import named_task

from scaleot_core.common import distributed
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, fingerprint, read_jsonl, write_json
from scaleot_core.common.runtime import setup
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.models.loading import load_tokenizer
from scaleot_core.models.streaming import load_sharded
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.cost import cost
from scaleot_core.tuning import examples
from scaleot_core.tuning.selection import tune

MODEL = Path("artifacts/model")


def main() -> None:
    params = load_params()
    task = named_task(params)
    folder = Path("artifacts/tasks") / task
    runtime = setup(params, f"full_finetune@{task}")
    key = fingerprint(
        params.full_finetune.model_dump(), params.data.block_size, params.seed, params.dtype, MODEL, folder
    )
    checkpoint = Checkpoint(scratch_dir(f"full_finetune-{task}-{key}"), params.checkpoint_seconds)
    with cost(Path(f"costs/full_finetune-{task}.json"), runtime) as meter:
        model, tokenizer = load_sharded(MODEL, device=runtime.device, dtype=runtime.dtype), load_tokenizer(MODEL)
        meter.count(model)
        size, rows = params.data.block_size, read_jsonl(folder / "train.jsonl")
        data = examples.from_task(model, tokenizer, task, rows, block_size=size)
        label, settings = f"full_finetune@{task}", params.full_finetune
        weights = dict(model.named_parameters())
        tuned = tune(model, weights, data, settings, seed=params.seed, label=label, checkpoint=checkpoint)
        questions = {task: read_jsonl(folder / "eval.jsonl")}
        batch = params.evaluate.batch_size
        measure = partial(evaluate, model, tokenizer, questions, batch_size=batch, label="full_finetune")
        results = distributed.broadcast_from_main(measure)
        with atomic_folder(Path(f"artifacts/baselines/full_finetune-{task}")) as out:
            write_json(out / "results.json", results[task])
            write_json(out / "tuning.json", {"lr": tuned.lr, "validation_loss": tuned.validation_loss})
            write_json(out / "history.json", tuned.history)
    checkpoint.remove()


if __name__ == "__main__":
    run_command(main)
