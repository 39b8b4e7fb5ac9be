"""Stage zero_shot, one per task: the real model on the evaluation questions, untuned. α and β don't touch it."""

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_json
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.pipeline import item_from_arguments, run_stage


def main() -> None:
    item = item_from_arguments("zero_shot")
    with run_stage("zero_shot", item) as stage:
        task, artifacts, runtime = item["task"], stage.artifacts, stage.runtime
        questions = {task: artifacts.questions(task, "eval")}
        model = load_model(artifacts.model, device=runtime.device, dtype=runtime.dtype)
        tokenizer = load_tokenizer(artifacts.model)
        stage.meter.count(model)
        batch_size = stage.params.evaluate.batch_size
        results = evaluate(model, tokenizer, questions, batch_size=batch_size, label=stage.label)
        write_json(artifacts.zero_shot(task), results[task])


if __name__ == "__main__":
    run_command(main)
