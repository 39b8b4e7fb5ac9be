"""Tasks as lm-evaluation-harness defines them, on questions that lie on disk.

Tuning takes its prompts from the same definition that evaluation scores, so that the two can't drift apart.
lm-eval is imported where it is used: it takes seconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.errors import UserError, one_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

OWN_TASKS = Path(__file__).parent / "lm_tasks"
Rows = Sequence[dict[str, Any]]


def _manager(name: str) -> "TaskManager":
    """A task manager that knows `name`; UserError if lm-eval doesn't.

    Indexing all of lm-eval's folders takes ten seconds, so those named like the task come first.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    packaged = Path(lm_eval.__file__).parent / "tasks"
    likely = [str(folder) for folder in packaged.iterdir() if folder.is_dir() and name.startswith(folder.name)]
    manager = TaskManager(include_path=[*likely, str(OWN_TASKS)], include_defaults=False)
    if name not in manager.all_subtasks:
        manager = TaskManager(include_path=str(OWN_TASKS))
    if name not in manager.all_subtasks:
        import difflib

        near = difflib.get_close_matches(name, manager.all_subtasks, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise UserError(f"params.yaml: tasks: {name!r} is no task of lm-eval; {hint}")
    return manager


def task_config(name: str) -> dict[str, Any]:
    """A task's definition as lm-eval reads it: dataset_path, dataset_name, the splits, the prompts.

    UserError for an unknown task, or one that can't be tuned and scored here.
    """
    manager = _manager(name)
    config = dict(manager.task_index[name].cfg or {})
    if config.get("output_type") != "multiple_choice":
        raise UserError(
            f"params.yaml: tasks: {name!r} is of type {config.get('output_type')!r}; use a multiple_choice task"
        )
    if not config.get("training_split"):
        raise UserError(f"params.yaml: tasks: {name!r} has no training split, so nothing can be tuned on it")
    if config["training_split"] == (config.get("test_split") or config.get("validation_split")):
        raise UserError(f"params.yaml: tasks: {name!r} is scored on its training split, which tells nothing")
    if config.get("metric_list") and "acc" not in [metric["metric"] for metric in config["metric_list"]]:
        raise UserError(f"params.yaml: tasks: {name!r} has no accuracy; use a task that has one")
    return config


def load_task(name: str, train: Rows, evaluation: Rows | None = None) -> "Task":
    """lm-eval's own task on our rows, which have the fields of its hub data set.

    Without `evaluation`, as on the data owner's side, the evaluated split is the training rows.
    """
    from datasets import Dataset, DatasetDict

    config = task_config(name)
    splits = {config["training_split"]: train}
    for split in (config.get("validation_split"), config.get("test_split"), config.get("fewshot_split")):
        if split and split not in splits:
            splits[split] = evaluation if evaluation is not None else train

    def rows_on_disk(**kwargs: Any) -> DatasetDict:
        return DatasetDict({split: Dataset.from_list(list(rows)) for split, rows in splits.items()})

    spec = {"group": "local", "task": [{"task": name, "custom_dataset": rows_on_disk}]}
    try:
        (task,) = _manager(name).load([spec])["tasks"].values()
    except Exception as error:  # whatever a definition does with a row that lacks its fields
        raise UserError(f"task {name}: its rows don't fit lm-eval's definition ({one_line(error)})") from error
    return task


def answer_pairs(
    task: "Task", tokenizer: PreTrainedTokenizerBase, *, context_length: int, part: str = "training"
) -> list[tuple[str, str]]:
    """(context, continuation) of every training question's right answer, to the letter as lm-eval scores it.

    `part` is what the rows are called in messages. UserError names the first row whose answer is missing or not among
    its choices, or of which a choice is empty or has more tokens than the model's context.
    """
    pairs = []
    for row, doc in enumerate(task.training_docs(), start=1):
        where = f"task {task.config.task}, {part} row {row}"
        try:
            context = task.fewshot_context(doc, 0)
            requests = task.construct_requests(doc, context, metadata=(task.config.task, row, 1))
            answer, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
        except Exception as error:
            raise UserError(f"{where}: no answer ({one_line(error)})") from error
        if not isinstance(answer, int) or not 0 <= answer < len(requests):
            raise UserError(f"{where}: answer {answer!r} is none of its choices")
        for number, (choice, request) in enumerate(zip(choices, requests, strict=False), start=1):
            continuation = request.args[1]
            if choice is None or not continuation.strip():  # a template prints a field that isn't set as None
                raise UserError(f"{where}: choice {number} is empty")
            tokens = len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
            if tokens > context_length:
                raise UserError(
                    f"{where}: choice {number} has {tokens} tokens, and the model's context is {context_length}"
                )
        pairs.append(requests[answer].args)
    return pairs
