"""Stage zero_shot, one per task: the real model on the evaluation questions, untuned. α and β don't touch it."""

from pathlib import Path

from _stage import named_task

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import read_jsonl, write_json
from scaleot_core.common.runtime import setup
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.training.cost import cost

MODEL = Path("artifacts/model")


def main() -> None:
    params = load_params()
    task = named_task(params)
    runtime = setup(params, f"zero_shot@{task}")
    with cost(Path(f"costs/zero_shot-{task}.json"), runtime) as meter:
        questions = {task: read_jsonl(Path("artifacts/tasks") / task / "eval.jsonl")}
        model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
        meter.count(model)
        size = params.evaluate.batch_size
        results = evaluate(model, load_tokenizer(MODEL), questions, batch_size=size, label="zero_shot")
        write_json(Path(f"artifacts/baselines/zero_shot-{task}.json"), results[task])


if __name__ == "__main__":
    run_command(main)
