"""Rows become columns of one kind, and a row that a task can't use is told by its line in one's own file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers import piqa_rows, refusal, refused, scaleot, tiny_model, write_package
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.files import write_csv
from scaleot_core.data import questions
from scaleot_core.evaluation.fields import PlacedRow, as_columns
from scaleot_core.evaluation.tasks import check_rows, load_task, right_choices

Row = dict[str, Any]
FEW = ("--epochs", 1, "--threads", 1, "--device", "cpu")
WINOGRANDE = [
    {"sentence": f"{i} beats _ .", "option1": "one", "option2": "two", "answer": str(i % 2 + 1)} for i in range(8)
]
GSM8K = [{"question": f"{i} + 1?", "answer": f"it is {i + 1} #### {i + 1}"} for i in range(8)]
HELLASWAG = [
    {"ind": i, "activity_label": "Counting", "ctx_a": f"One counts to {i}.", "ctx_b": "then", "ctx": f"to {i}. Then"}
    | {"endings": [f"comes {i + k}." for k in range(4)], "label": str(i % 4)}
    for i in range(8)
]
ROWS = {"piqa": piqa_rows(8), "winogrande": WINOGRANDE, "gsm8k": GSM8K, "hellaswag": HELLASWAG}


def placed(rows: list[Row]) -> list[Row]:
    """Rows as they come from a file: with a blank line before them."""
    return [PlacedRow(row, f"mine.jsonl, line {number}") for number, row in enumerate(rows, start=2)]


def changed(task: str, index: int, **fields: Any) -> list[Row]:
    """A task's rows, one of them with other fields, or, for `...`, without them."""
    rows = [dict(row) for row in ROWS[task]]
    rows[index] = {name: value for name, value in (rows[index] | fields).items() if value is not ...}
    return placed(rows)


@pytest.fixture
def refusal_of(tokenizer: PreTrainedTokenizerFast) -> Callable[[str, list[Row]], str]:
    return lambda task, rows: refusal(lambda: check_rows(task, rows, tokenizer, context_length=512, part="training"))


def test_columns_have_the_kind_of_most_rows() -> None:
    rows: list[Row] = [{"a": 1, "b": "x"}, {"a": True, "b": ["x"]}, {"b": "y", "c": {"d": 1}}, {"a": "1", "b": None}]
    assert as_columns(rows) == {
        "a": [1, 1, None, None],
        "b": ["x", None, "y", None],
        "c": [None, None, {"d": 1}, None],
    }
    assert as_columns([{"a": float("nan")}, {"a": "x"}]) == {"a": [None, "x"]}  # as pandas writes a missing text
    assert as_columns([{"a": True}, {"a": None}]) == {"a": [True, None]}


NEEDED = {"piqa": ["goal", "sol2", "label"], "gsm8k": ["question", "answer"], "winogrande": ["answer"]}
NEEDED |= {"hellaswag": ["ctx_a", "endings", "label"]}
WRONG: list[tuple[str, Row]] = [
    *((task, {field: value}) for task, fields in NEEDED.items() for field in fields for value in (..., None)),
    *(("piqa", {"label": label}) for label in (7, -1, "1", 0.5)),
    *(("winogrande", {"answer": answer}) for answer in (1, "one")),
    *(("hellaswag", {"label": label}) for label in ("x", "4")),
    ("piqa", {"goal": ["count", "to 3"]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "fields"), WRONG, ids=repr)
def test_row_with_a_missing_or_wrong_field_is_named_with_its_line(
    refusal_of: Callable[[str, list[Row]], str], task: str, fields: Row
) -> None:
    """A template would print null, "Question: None"; a function of the definition would stumble over it."""
    assert refusal_of(task, changed(task, 3, **fields)).startswith(f"task {task}, mine.jsonl, line 5: ")


def test_field_that_no_prompt_has_may_be_anything(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = changed("piqa", 3, source={"from": ["me"]}, difficulty=2)
    rows[4] = PlacedRow({**rows[4], "source": "you", "difficulty": None, "goal": "say None"}, "")
    check_rows("piqa", rows, tokenizer, context_length=512, part="training")


@pytest.mark.parametrize("change", [float, bool])
def test_labels_that_lm_eval_takes_for_numbers_are_taken(
    tokenizer: PreTrainedTokenizerFast, change: Callable[[Any], Any]
) -> None:
    rows = placed([{**row, "label": change(row["label"])} for row in piqa_rows(8)])
    check_rows("piqa", rows, tokenizer, context_length=512, part="training")
    task = load_task("piqa", rows)
    docs = list(task.training_docs())
    assert [right_choices(task, doc) for doc in docs] == [[i % 2] for i in range(8)]
    assert task.process_results(docs[1], [(-2.0, False), (-1.0, True)])["acc"] == 1  # which a float is no index for


def test_rows_of_another_task_are_refused(refusal_of: Callable[[str, list[Row]], str]) -> None:
    message = refusal_of("hellaswag", placed(piqa_rows(8)))
    assert message.startswith("task hellaswag, mine.jsonl, line 2: lm-eval's definition can't use the row")
    assert "there are no training questions" in refusal_of("piqa", [])


def test_rows_that_are_shuffled_and_cut_know_their_line(
    tmp_path: Path, refusal_of: Callable[[str, list[Row]], str]
) -> None:
    (tmp_path / "piqa").mkdir()
    rows = piqa_rows(30)
    rows[2]["label"] = 7
    (tmp_path / "piqa" / "train.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, rows)))
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, piqa_rows(40)[30:])))
    train, _ = questions.load(str(tmp_path), "piqa", wheel=None, train=50, evaluate=50, seed=0)
    assert train.index(rows[2]) != 2
    assert refusal_of("piqa", train).startswith(f"task piqa, {tmp_path}/piqa/train.jsonl, line 6: ")


# --- files as others write them --------------------------------------------------------------------------


def as_lines(rows: list[Row]) -> str:
    return "\n".join(map(json.dumps, rows))


FILES: dict[str, Callable[[Path, list[Row]], Any]] = {
    "train.jsonl": lambda file, rows: file.write_text(as_lines(rows), encoding="utf-8-sig", newline="\r\n"),  # Windows
    "train.JSONL.GZ": lambda file, rows: file.write_bytes(gzip.compress(as_lines(rows).encode())),
    "train.json": lambda file, rows: file.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig"),
    "train.parquet": lambda file, rows: Dataset.from_list(rows).to_parquet(str(file)),
}


@pytest.mark.parametrize("name", FILES)
def test_questions_of_any_file_are_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    folder = tmp_path / "piqa"
    folder.mkdir()
    FILES[name](folder / name, piqa_rows(12))
    (folder / "validation.jsonl").write_text(as_lines(piqa_rows(16)[12:]))
    (folder / "train.jsonl.dvc").write_text("what others put beside it")
    train, _ = questions.load(str(tmp_path), "piqa", wheel=None, train=50, evaluate=50, seed=0)
    assert sorted(row["goal"] for row in train) == sorted(str(row["goal"]) for row in piqa_rows(12))
    package = write_package(tmp_path / "package", tiny_model("llama"), tokenizer)
    assert not scaleot("tune", package, "--task", "piqa", "--data", folder / name, "--out", tmp_path / "a", *FEW).code
    FILES[name](folder / name, [{**row, "label": 7 if i == 4 else row["label"]} for i, row in enumerate(piqa_rows(12))])
    message = refused("tune", package, "--task", "piqa", "--data", folder / name, "--out", tmp_path / "b", *FEW)
    assert f"task piqa, {folder / name}, " in message and " 5: its answer is none of its choices" in message


def test_csv_serves_tasks_whose_fields_are_texts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, refusal_of: Callable[[str, list[Row]], str]
) -> None:
    file, rows = tmp_path / "mine.csv", [{"question": "How, many?", "answer": "Two.\n#### 2"}, *GSM8K]
    write_csv(file, rows, ["question", "answer"])
    assert [dict(row) for row in questions.read(file)] == rows
    check_rows("gsm8k", questions.read(file), tokenizer, context_length=512, part="training")
    write_csv(file, piqa_rows(4))
    assert f"{file}, line 2: its answer is none" in refusal_of("piqa", questions.read(file))
