"""Tasks as lm-evaluation-harness defines them, on questions that lie on disk.

Tuning takes its prompts from the same definition that evaluation scores, so that the two can't drift apart.
lm-eval is imported where it is used: it takes seconds.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.evaluation.definitions import task_config, task_manager
from scaleot_core.evaluation.fields import Rows, as_columns, place
from scaleot_core.evaluation.judgement import check_answers

if TYPE_CHECKING:
    from lm_eval.api.task import Task

MAX_GENERATED = 256  # tokens, where a definition doesn't say: lm-eval's own default
Pair = tuple[str, str]
"""A context and its continuation."""


def load_task(name: str, train: Rows, evaluation: Rows | None = None) -> "Task":
    """Load lm-eval's own task on our rows, which have the fields of its hub data set.

    Without `evaluation`, as on the data owner's side, the evaluated split is the training rows. UserError names the
    first row that the definition can't load, with lm-eval's reason, and a field that no row has.
    """
    parts = {"training": train, "evaluation": train if evaluation is None else evaluation}
    for part, rows in parts.items():
        if not rows:
            raise UserError(f"task {name}: there are no {part} questions")
    try:
        task = _build(name, **parts)
    except UserError:
        raise
    except ImportError as error:  # of a package that the definition needs: no row is to blame
        raise UserError(f"task {name}: lm-eval's definition doesn't run here ({one_line(error)})") from error
    except Exception as error:  # whatever a definition does with a row that it can't use
        raise _unfit(name, parts, error) from error
    answer = None if task.OUTPUT_TYPE == "multiple_choice" else task.config.doc_to_target  # else it must be a choice
    for field in (task.config.doc_to_text, answer):
        if isinstance(field, str) and field.isidentifier() and field not in task.features:  # lm-eval takes it for text
            raise UserError(f"task {name}, {place(train[0], 'row 1')}: the field `{field}` is missing, as in all rows")
    return task


def _build(name: str, training: Rows, evaluation: Rows) -> "Task":
    """Make lm-eval's task on some rows; raise whatever its definition raises."""
    from datasets import Dataset, DatasetDict

    config = task_config(name)
    train_split = config["training_split"] or "train"
    splits = {train_split: training}
    for split in (config.get("validation_split"), config.get("test_split"), config.get("fewshot_split")):
        if split and split not in splits:
            splits[split] = evaluation

    def rows_on_disk(**kwargs: Any) -> DatasetDict:
        return DatasetDict({split: Dataset.from_dict(as_columns(rows)) for split, rows in splits.items()})

    ours = {"custom_dataset": rows_on_disk, "training_split": train_split}
    (task,) = task_manager(name).load([{"group": "local", "task": [{"task": name, **ours}]}])["tasks"].values()
    return task


def _unfit(name: str, parts: Mapping[str, Rows], error: Exception) -> UserError:
    """Return the error that names the first row with which those before it make no task."""

    def fails(rows: Rows, count: int) -> bool:
        try:
            _build(name, rows[:count], rows[:count])
        except Exception:
            return True
        return False

    for part, rows in parts.items():
        index = bisect_left(range(1, len(rows) + 1), True, key=partial(fails, rows))
        if index < len(rows):
            return UserError(f"task {name}, {place(rows[index], f'{part} row {index + 1}')}: {_reason(error)}")
    return UserError(f"task {name}: {_reason(error)}")


def _reason(error: Exception) -> str:
    text = f"the field {one_line(error)} is missing" if isinstance(error, KeyError) else one_line(error)
    return f"lm-eval's definition can't use the row ({text})"


def metrics(task: "Task") -> dict[str, bool]:
    """List a task's metrics, the main one first, each with whether higher is better.

    lm-eval's metrics, by the names that they have in our results; where a definition has several filters, with the
    filter's name. Then ours: `answer_nll`, or for a text `token_perplexity`.
    """
    filters = [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]]
    higher_is_better = {
        metric_name(metric, name if len(filters) > 1 else "none"): better
        for metric, better in task.higher_is_better().items()
        for name in filters
    }
    return higher_is_better | {
        "token_perplexity" if task.OUTPUT_TYPE == "loglikelihood_rolling" else "answer_nll": False
    }


def metric_name(metric: str, filter_name: str) -> str:
    """Name a metric as our results do."""
    return metric if filter_name == "none" else f"{metric}_{filter_name}"


def right_choices(task: "Task", doc: dict[str, Any]) -> list[int]:
    """List the right choices of a multiple-choice question, by index; leave out an answer that is no choice."""
    answer: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else None
    answers = answer if isinstance(answer, list) else [answer]
    return [int(choice) for choice in answers if _is_index(choice) and 0 <= choice < len(choices)]


def _is_index(value: Any) -> bool:
    """Tell whether a value can be an index: lm-eval takes true for 1, and 1.0, which pandas makes of 1, for 1 too."""
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def answer_pairs(
    task: "Task",
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    rows: Rows = (),
    part: str = "training",
) -> list[Pair]:
    """Return (context, continuation) of every training question's right answer, to the letter as lm-eval scores it.

    Of several right answers the first. `rows` are those that the task was made of, if they know where they come from;
    `part` is what they are called in messages otherwise. UserError names the first row that the definition can't use,
    whose answer is none of its choices, or of which a choice is empty or has more tokens than the model's context.
    """
    pairs = []
    docs = list(task.training_docs())
    for number, doc in enumerate(docs, start=1):
        where = _where(task, docs, number, rows, part)
        choices, right, scored = _requests(task, doc, where)
        if not right:
            raise UserError(f"{where}: its answer is none of its choices")
        for index, (choice, (_, continuation)) in enumerate(zip(choices, scored, strict=False), start=1):
            what = f"choice {index}" if len(choices) > 1 else "the answer"
            if choice is None or not continuation.strip():
                raise UserError(f"{where}: {what} is empty")
            tokens = len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
            if tokens > context_length:
                raise UserError(f"{where}: {what} has {tokens} tokens, and the model's context is {context_length}")
        if None in doc.values() and "None" in str(scored):  # a template prints null so, and refuses what is undefined
            _requests(task, {field: value for field, value in doc.items() if value is not None}, where)
        pairs.append(scored[right[0]])
    return pairs


def _requests(task: "Task", doc: dict[str, Any], where: str) -> tuple[list[Any], list[int], list[Pair]]:
    """Return a question's choices, the right ones by index, and what lm-eval scores for each choice."""
    try:
        context = task.fewshot_context(doc, 0)
        if task.OUTPUT_TYPE == "multiple_choice":
            requests = task.construct_requests(doc, context, metadata=(task.config.task, 0, 1))
            return task.doc_to_choice(doc), right_choices(task, doc), [request.args for request in requests]
        answer = _target(task, doc)
        return [answer], [0], [(context, f"{task.config.target_delimiter}{answer}")]
    except Exception as error:  # whatever a definition does with a row that it can't use
        raise UserError(f"{where}: {_reason(error)}") from error


def _where(task: "Task", docs: Sequence[Any], number: int, rows: Rows, part: str) -> str:
    """Say where a question comes from: its own place, unless the definition has left some questions out."""
    otherwise = f"{part} row {number}"
    return f"task {task.config.task}, {place(rows[number - 1], otherwise) if len(rows) == len(docs) else otherwise}"


def check_rows(name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, *, context_length: int, part: str) -> None:
    """Raise UserError if a row can't be tuned on or scored, naming the first, or if the context is too short.

    Or if the task's definition doesn't score as right what would be tuned on.
    """
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
        pairs = answer_pairs(task, tokenizer, context_length=context_length, rows=rows, part=part)
        check_answers(task, zip(task.training_docs(), pairs, strict=True))


def texts(task: "Task", *, rows: Rows = (), part: str = "training") -> list[str]:
    """List the training texts of a task that scores whole texts; UserError names an empty row."""
    texts = []
    docs = list(task.training_docs())
    for number, doc in enumerate(docs, start=1):
        where = _where(task, docs, number, rows, part)
        try:
            text = _target(task, doc)
        except Exception as error:
            raise UserError(f"{where}: {_reason(error)}") from error
        if not text or not text.strip():
            raise UserError(f"{where}: its text is empty")
        texts.append(text)
    return texts


def _target(task: "Task", doc: dict[str, Any]) -> str | None:
    """Return a question's answer, or a text; None if a template prints a field that isn't set."""
    target: Any = task.doc_to_target(doc)
    if isinstance(target, list):
        target = target[0]
    return None if target is None or (target == "None" and None in doc.values()) else str(target)
