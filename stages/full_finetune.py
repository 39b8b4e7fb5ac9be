"""Stage full_finetune, one per task: all weights of the real model tuned, the ceiling. α and β don't touch it."""

from functools import partial

from scaleot_core.common import distributed
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, write_json
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.models.loading import load_tokenizer
from scaleot_core.models.streaming import load_sharded
from scaleot_core.pipeline import item_from_arguments, run_stage
from scaleot_core.tuning import examples
from scaleot_core.tuning.selection import tune


def main() -> None:
    item = item_from_arguments("full_finetune")
    with run_stage("full_finetune", item) as stage:
        task, params, artifacts, runtime = item["task"], stage.params, stage.artifacts, stage.runtime
        model = load_sharded(artifacts.model, device=runtime.device, dtype=runtime.dtype)
        stage.meter.count(model)
        tokenizer = load_tokenizer(artifacts.model)
        rows = artifacts.questions(task, "train")
        data = examples.from_task(model, tokenizer, task, rows, block_size=params.data.block_size)
        tuned = tune(
            model,
            dict(model.named_parameters()),
            data,
            params.full_finetune,
            seed=params.seed,
            label=stage.label,
            checkpoint=stage.checkpoint,
        )
        questions, batch_size = {task: artifacts.questions(task, "eval")}, params.evaluate.batch_size
        measure = partial(evaluate, model, tokenizer, questions, batch_size=batch_size, label=stage.label)
        results = distributed.broadcast_from_main(measure)
        with atomic_folder(artifacts.full_finetune(task)) as out:
            write_json(out / "results.json", results[task])
            write_json(out / "tuning.json", {"lr": tuned.lr, "validation_loss": tuned.validation_loss})
            write_json(out / "history.json", tuned.history)


if __name__ == "__main__":
    run_command(main)
