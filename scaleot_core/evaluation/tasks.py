"""Tasks as lm-evaluation-harness defines them, on questions that lie on disk.

Tuning takes its prompts from the same definition that evaluation scores, so that the two can't drift apart.
lm-eval is imported where it is used: it takes seconds.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.evaluation.definitions import task_config, task_manager
from scaleot_core.evaluation.rows import Rows, as_columns, check_filled, described, label_fields, place, unfit

if TYPE_CHECKING:
    from lm_eval.api.task import Task

MAX_GENERATED = 256  # tokens, where a definition doesn't say: lm-eval's own default


def load_task(name: str, train: Rows, evaluation: Rows | None = None) -> "Task":
    """Load lm-eval's own task on our rows, which have the fields of its hub data set.

    Without `evaluation`, as on the data owner's side, the evaluated split is the training rows. UserError names the
    first row that the definition can't use, and the field in it.
    """
    parts = {"training": train}
    if evaluation is not None and evaluation is not train:
        parts["evaluation"] = evaluation
    tasks = [_fitting(name, rows, part) for part, rows in parts.items()]
    return tasks[0] if len(tasks) == 1 else _build(name, train, evaluation)


def _fitting(name: str, rows: Rows, part: str) -> "Task":
    """Make a task on one part's rows; UserError where they don't fit its definition."""
    if not rows:
        raise UserError(f"task {name}: there are no {part} questions")
    build = partial(_build, name)
    try:
        task = build(rows)
    except UserError:
        raise
    except Exception as error:  # whatever a definition does with a row that it can't use
        raise unfit(f"task {name}", rows, build, error, part=part) from error
    check_filled(task, f"task {name}", rows, build, part=part)
    return task


def _build(name: str, train: Rows, evaluation: Rows | None = None) -> "Task":
    """Make lm-eval's task on some rows; whatever the definition raises."""
    from datasets import Dataset, DatasetDict

    config = task_config(name)
    training = config["training_split"] or "train"
    splits = {training: train}
    for split in (config.get("validation_split"), config.get("test_split"), config.get("fewshot_split")):
        if split and split not in splits:
            splits[split] = evaluation if evaluation is not None else train

    def rows_on_disk(**kwargs: Any) -> DatasetDict:
        return DatasetDict({split: Dataset.from_dict(as_columns(rows)) for split, rows in splits.items()})

    ours = {"custom_dataset": rows_on_disk, "training_split": training}
    (task,) = task_manager(name).load([{"group": "local", "task": [{"task": name, **ours}]}])["tasks"].values()
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
    choices = task.doc_to_choice(doc)
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else None
    found = answer if isinstance(answer, list) else [answer]
    return [int(choice) for choice in found if _whole(choice) and 0 <= choice < len(choices)]


def _whole(value: Any) -> bool:
    """Tell whether a value counts choices: lm-eval takes true for 1, and 1.0, which pandas makes of 1, for 1 too."""
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def answer_pairs(
    task: "Task",
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    rows: Rows = (),
    part: str = "training",
) -> list[tuple[str, str]]:
    """Give (context, continuation) of every training question's right answer, to the letter as lm-eval scores it.

    Of several right answers the first. `rows` are those that the task was made of, if they know where they lie; `part`
    is what they are called in messages otherwise. UserError names the first row whose answer is missing or not among
    its choices, or of which a choice is empty or has more tokens than the model's context.
    """
    pairs = []
    docs = list(task.training_docs())
    for row, doc in enumerate(docs, start=1):
        where = _where(task, docs, row, rows, part)
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
            raise UserError(f"{where}: no answer ({_stated(task, doc)}{one_line(error)})") from error
        if not right:
            raise UserError(f"{where}: its answer is none of its choices{_needed(task, doc, len(choices))}")
        for number, (choice, (_, continuation)) in enumerate(zip(choices, continued, strict=False), start=1):
            what = f"choice {number}" if len(choices) > 1 else "the answer"
            if choice is None or not continuation.strip():  # a template prints a field that isn't set as None
                raise UserError(f"{where}: {what} is empty")
            tokens = len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
            if tokens > context_length:
                raise UserError(f"{where}: {what} has {tokens} tokens, and the model's context is {context_length}")
        pairs.append(continued[right[0]])
    return pairs


def _where(task: "Task", docs: Sequence[Any], row: int, rows: Rows, part: str) -> str:
    """Say where a question comes from: its own place, unless the definition has left some questions out."""
    otherwise = f"{part} row {row}"
    return f"task {task.config.task}, {place(rows[row - 1], otherwise) if len(rows) == len(docs) else otherwise}"


def _stated(task: "Task", doc: dict[str, Any]) -> str:
    """Say what a question's label is, where that is what its definition fails for."""
    try:
        right_choices(task, doc) if task.OUTPUT_TYPE == "multiple_choice" else _target(task, doc)
    except Exception:
        fields = label_fields(task, doc)
        return f"{described(doc, fields[0])}; " if fields else ""
    return ""


def _needed(task: "Task", doc: dict[str, Any], count: int) -> str:
    """Say what a question's label is, and what it should be where the field counts its choices."""
    fields = label_fields(task, doc)
    needed = f"; a number from 0 to {count - 1} is needed" if task.config.doc_to_target in fields else ""
    return f": {described(doc, fields[0])}{needed}" if fields else ""


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
        texts(task, rows=rows, part=part)
    else:
        answer_pairs(task, tokenizer, context_length=context_length, rows=rows, part=part)


def texts(task: "Task", *, rows: Rows = (), part: str = "training") -> list[str]:
    """List the training texts of a task that scores whole texts; UserError names an empty row."""
    found = []
    docs = list(task.training_docs())
    for row, doc in enumerate(docs, start=1):
        where = _where(task, docs, row, rows, part)
        try:
            text = _target(task, doc)
        except Exception as error:
            raise UserError(f"{where}: no text ({one_line(error)})") from error
        if not text or not text.strip():
            raise UserError(f"{where}: its text is empty")
        found.append(text)
    return found


def _target(task: "Task", doc: dict[str, Any]) -> str | None:
    """Give a question's answer, or a text; None where a template prints a field that isn't set."""
    target: Any = task.doc_to_target(doc)
    if isinstance(target, list):
        target = target[0]
    return None if target is None or (target == "None" and None in doc.values()) else str(target)
