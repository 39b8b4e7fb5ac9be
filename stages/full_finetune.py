"""Stage full_finetune, one per task: all weights of the real model tuned, the ceiling. α and β don't touch it."""

from functools import partial
from pathlib import Path

from scaleot_core import examples, parallel
from scaleot_core.ending import ends_in_one_line
from scaleot_core.evaluation import evaluate
from scaleot_core.files import fingerprint, read_jsonl, whole_folder, write_json
from scaleot_core.models import load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.runtime import cost, named_task, setup
from scaleot_core.streaming import load_split
from scaleot_core.training import Checkpoint, scratch
from scaleot_core.tuning import tune

MODEL = Path("artifacts/model")


def main() -> None:
    params = load_params()
    task = named_task(params)
    folder = Path("artifacts/tasks") / task
    runtime = setup(params, f"full_finetune@{task}")
    key = fingerprint(
        params.full_finetune.model_dump(), params.data.block_size, params.seed, params.dtype, MODEL, folder
    )
    checkpoint = Checkpoint(scratch(f"full_finetune-{task}-{key}"), params.checkpoint_seconds)
    with cost(Path(f"costs/full_finetune-{task}.json"), runtime) as meter:
        model, tokenizer = load_split(MODEL, device=runtime.device, dtype=runtime.dtype), load_tokenizer(MODEL)
        meter.count(model)
        size, rows = params.data.block_size, read_jsonl(folder / "train.jsonl")
        data = examples.from_task(model, tokenizer, task, rows, block_size=size)
        label, settings = f"full_finetune@{task}", params.full_finetune
        weights = dict(model.named_parameters())
        tuned = tune(model, weights, data, settings, seed=params.seed, label=label, checkpoint=checkpoint)
        questions = {task: read_jsonl(folder / "eval.jsonl")}
        batch = params.evaluate.batch_size
        measure = partial(evaluate, model, tokenizer, questions, batch_size=batch, label="full_finetune")
        results = parallel.from_first(measure)
        with whole_folder(Path(f"artifacts/baselines/full_finetune-{task}")) as out:
            write_json(out / "results.json", results[task])
            write_json(out / "tuning.json", {"lr": tuned.lr, "validation_loss": tuned.validation_loss})
            write_json(out / "history.json", tuned.history)
    checkpoint.remove()


if __name__ == "__main__":
    ends_in_one_line(main)
