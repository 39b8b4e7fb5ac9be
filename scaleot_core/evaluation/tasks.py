"""Tasks as lm-evaluation-harness defines them, on questions that lie on disk.

Tuning takes its prompts from the same definition that evaluation scores, so that the two can't drift apart.
lm-eval is imported where it is used: it takes seconds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

OWN_TASKS = Path(__file__).parent / "lm_tasks"
OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood_rolling")
MAX_GENERATED = 256  # tokens, where a definition doesn't say: lm-eval's own default
Rows = Sequence[dict[str, Any]]


def _manager(name: str) -> "TaskManager":
    """Make a task manager that knows `name`; UserError if lm-eval doesn't.

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
        raise UserError(f"{name!r} is no task of lm-eval; {hint}", parameter="tasks")
    return manager


def task_config(name: str) -> dict[str, Any]:
    """Read a task's definition as lm-eval does: dataset_path, dataset_name, the splits, the prompts.

    `training_split` is None where it names none, as some do whose data has one: lm-eval needs it only for examples in
    the prompt. UserError for an unknown task, or one that can't be tuned and scored here.
    """
    manager = _manager(name)
    config = dict(manager.task_index[name].cfg or {})
    if config.get("output_type", "generate_until") not in OUTPUT_TYPES:
        raise UserError(
            f"{name!r} is of type {config['output_type']!r}; use one of {', '.join(OUTPUT_TYPES)}", parameter="tasks"
        )
    config["training_split"] = config.get("training_split")
    if not evaluated_split(config):
        raise UserError(f"{name!r} has neither a test nor a validation split to evaluate on", parameter="tasks")
    if config["training_split"] == evaluated_split(config):
        raise UserError(f"{name!r} is scored on its training split, so its score is meaningless", parameter="tasks")
    return config


def evaluated_split(config: Mapping[str, Any]) -> str | None:
    """Name the split that a definition scores."""
    return config.get("test_split") or config.get("validation_split")


def load_task(name: str, train: Rows, evaluation: Rows | None = None) -> "Task":
    """Load lm-eval's own task on our rows, which have the fields of its hub data set.

    Without `evaluation`, as on the data owner's side, the evaluated split is the training rows.
    """
    from datasets import Dataset, DatasetDict

    config = task_config(name)
    training = config["training_split"] or "train"
    splits = {training: train}
    for split in (config.get("validation_split"), config.get("test_split"), config.get("fewshot_split")):
        if split and split not in splits:
            splits[split] = evaluation if evaluation is not None else train

    def rows_on_disk(**kwargs: Any) -> DatasetDict:
        return DatasetDict({split: Dataset.from_list(list(rows)) for split, rows in splits.items()})

    ours = {"custom_dataset": rows_on_disk, "training_split": training}
    try:
        (task,) = _manager(name).load([{"group": "local", "task": [{"task": name, **ours}]}])["tasks"].values()
    except Exception as error:  # whatever a definition does with a row that lacks its fields
        raise UserError(f"task {name}: its rows don't fit lm-eval's definition ({one_line(error)})") from error
    return task


def metrics(task: "Task") -> dict[str, bool]:
    """List a task's metrics, the main one first, each with whether higher is better.

    lm-eval's metrics, by the names that they have in our results; where a definition has several filters, with the
    filter's name. Then ours: `answer_nll`, or for a text `token_perplexity`.
    """
    filters = [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]]
    found = {
        metric_name(metric, name if len(filters) > 1 else "none"): better
        for metric, better in task.higher_is_better().items()
        for name in filters
    }
    return found | {"token_perplexity" if task.OUTPUT_TYPE == "loglikelihood_rolling" else "answer_nll": False}


def metric_name(metric: str, filter_name: str) -> str:
    """Name a metric as our results do."""
    return metric if filter_name == "none" else f"{metric}_{filter_name}"


def right_choices(task: "Task", doc: dict[str, Any]) -> list[int]:
    """List the right choices of a multiple-choice question, as lm-eval reads it; unknown ones are left out."""
    answer: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(answer, str):
        answer = task.doc_to_choice(doc).index(answer)
    found = answer if isinstance(answer, list) else [answer]
    count = len(task.doc_to_choice(doc))
    return [choice for choice in found if type(choice) is int and 0 <= choice < count]


def answer_pairs(
    task: "Task", tokenizer: PreTrainedTokenizerBase, *, context_length: int, part: str = "training"
) -> list[tuple[str, str]]:
    """Give (context, continuation) of every training question's right answer, to the letter as lm-eval scores it.

    Of several right answers the first. `part` is what the rows are called in messages. UserError names the first row
    whose answer is missing or not among its choices, or of which a choice is empty or has more tokens than the model's
    context.
    """
    pairs = []
    for row, doc in enumerate(task.training_docs(), start=1):
        where = f"task {task.config.task}, {part} row {row}"
        try:
            context = task.fewshot_context(doc, 0)
            if task.OUTPUT_TYPE == "multiple_choice":
                requests = task.construct_requests(doc, context, metadata=(task.config.task, row, 1))
                continued = [request.args for request in requests]
                choices, right = task.doc_to_choice(doc), right_choices(task, doc)
            else:
                choices, right = [_target(task, doc)], [0]
                continued = [(context, f"{task.config.target_delimiter}{choices[0]}")]
        except Exception as error:
            raise UserError(f"{where}: no answer ({one_line(error)})") from error
        if not right:
            raise UserError(f"{where}: its answer is none of its choices")
        for number, (choice, (_, continuation)) in enumerate(zip(choices, continued, strict=False), start=1):
            what = f"choice {number}" if len(choices) > 1 else "the answer"
            if choice is None or not continuation.strip():  # a template prints a field that isn't set as None
                raise UserError(f"{where}: {what} is empty")
            tokens = len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
            if tokens > context_length:
                raise UserError(f"{where}: {what} has {tokens} tokens, and the model's context is {context_length}")
        pairs.append(continued[right[0]])
    return pairs


def check_rows(name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, *, context_length: int, part: str) -> None:
    """UserError naming the first row of a task that can't be tuned on or scored, or a context too short for it."""
    task = load_task(name, rows)
    generated = (task.config.generation_kwargs or {}).get("max_gen_toks", MAX_GENERATED)
    if task.OUTPUT_TYPE == "generate_until" and generated >= context_length:
        raise UserError(
            f"task {name}: it generates up to {generated} tokens, and the model's context is {context_length}; "
            "use another task or model"
        )
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        texts(task, part=part)
    else:
        answer_pairs(task, tokenizer, context_length=context_length, part=part)


def texts(task: "Task", *, part: str = "training") -> list[str]:
    """List the training texts of a task that scores whole texts; UserError names an empty row."""
    found = []
    for row, doc in enumerate(task.training_docs(), start=1):
        try:
            text = _target(task, doc)
        except Exception as error:
            raise UserError(f"task {task.config.task}, {part} row {row}: no text ({one_line(error)})") from error
        if not text or not text.strip():
            raise UserError(f"task {task.config.task}, {part} row {row}: its text is empty")
        found.append(text)
    return found


def _target(task: "Task", doc: dict[str, Any]) -> str | None:
    """Give a question's answer, or a text; None where a template prints a field that isn't set."""
    target: Any = task.doc_to_target(doc)
    if isinstance(target, list):
        target = target[0]
    return None if target is None or (target == "None" and None in doc.values()) else str(target)
