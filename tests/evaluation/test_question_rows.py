"""A row that a task can't use is told by its line in one's own file, the field and its value."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from datasets import Dataset
from helpers import piqa_rows, refusal, refused, scaleot, tiny_model, write_package
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.files import write_csv
from scaleot_core.data import questions
from scaleot_core.evaluation import definitions
from scaleot_core.evaluation.definitions import task_config, task_manager
from scaleot_core.evaluation.rows import PlacedRow
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
RIGHT = {"piqa": piqa_rows(8), "winogrande": WINOGRANDE, "gsm8k": GSM8K, "hellaswag": HELLASWAG}


def lines(rows: list[Row]) -> list[Row]:
    """Rows as they come from a file: with a blank line before them."""
    return [PlacedRow(row, f"mine.jsonl, line {number}") for number, row in enumerate(rows, start=2)]


def changed(task: str, index: int, **fields: Any) -> list[Row]:
    """A task's rows, one with other fields, or, where None is given for `...`, without them."""
    rows = [dict(row) for row in RIGHT[task]]
    rows[index] |= fields
    rows[index] = {name: value for name, value in rows[index].items() if value is not ...}
    return lines(rows)


@pytest.fixture
def told(tokenizer: PreTrainedTokenizerFast) -> Callable[[str, list[Row]], str]:
    """What is said of a task's rows."""
    return lambda task, rows: refusal(lambda: check_rows(task, rows, tokenizer, context_length=512, part="training"))


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize(
    ("task", "field"),
    [
        ("piqa", "goal"),
        ("piqa", "sol2"),
        ("piqa", "label"),
        ("gsm8k", "question"),
        ("gsm8k", "answer"),
        ("winogrande", "answer"),
        ("winogrande", "sentence"),
        ("hellaswag", "ctx_a"),
        ("hellaswag", "ctx_b"),
        ("hellaswag", "endings"),
        ("hellaswag", "label"),
    ],
)
def test_field_that_is_missing_or_null_is_named_with_its_line(
    told: Callable[[str, list[Row]], str], task: str, field: str, index: int
) -> None:
    """A template would print it, "Question: None"; a function of the definition would stumble over it."""
    for value, what in ((..., "is missing"), (None, "is null")):
        said = told(task, changed(task, index, **{field: value}))
        assert said.startswith(f"task {task}, mine.jsonl, line {index + 2}: ")
        assert f"the field `{field}` {what}" in said


def test_field_that_no_prompt_has_may_be_anything(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = changed("piqa", 3, source={"from": ["me"]}, difficulty=2)
    rows[4] = PlacedRow({**rows[4], "source": "you", "difficulty": None}, "")
    check_rows("piqa", rows, tokenizer, context_length=512, part="training")


def test_list_in_the_place_of_text_is_named(told: Callable[[str, list[Row]], str]) -> None:
    said = told("piqa", changed("piqa", 3, goal=["count", "to 3"]))
    assert said == "task piqa, mine.jsonl, line 5: `goal` is ['count', 'to 3'] (a list), and text in other rows"


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize(
    ("task", "field", "value", "shown"),
    [
        ("piqa", "label", 7, "`label` is 7 (a number)"),
        ("piqa", "label", -1, "`label` is -1 (a number)"),
        ("piqa", "label", "1", "`label` is '1' (text), and a number in other rows"),
        ("piqa", "label", 0.5, "`label` is 0.5 (a number)"),
        ("winogrande", "answer", 1, "`answer` is 1 (a number)"),
        ("winogrande", "answer", "one", "`answer` is 'one' (text)"),
        ("hellaswag", "label", "x", "`label` is 'x' (text)"),
        ("hellaswag", "label", "4", "4"),
    ],
)
def test_label_that_is_none_is_named_with_its_line_and_value(
    told: Callable[[str, list[Row]], str], task: str, field: str, value: Any, shown: str, index: int
) -> None:
    said = told(task, changed(task, index, **{field: value}))
    assert said.startswith(f"task {task}, mine.jsonl, line {index + 2}: ") and shown in said


@pytest.mark.parametrize(("task", "field", "change"), [("piqa", "label", str), ("winogrande", "answer", int)])
def test_labels_that_are_all_of_another_kind_are_named(
    told: Callable[[str, list[Row]], str], task: str, field: str, change: Callable[[Any], Any]
) -> None:
    said = told(task, lines([{**row, field: change(row[field])} for row in RIGHT[task]]))
    value = change(RIGHT[task][0][field])
    assert "mine.jsonl, line 2: " in said and f"`{field}` is {value!r} (" in said


@pytest.mark.parametrize("change", [float, bool])
def test_labels_that_lm_eval_takes_for_numbers_are_taken(
    tokenizer: PreTrainedTokenizerFast, change: Callable[[Any], Any]
) -> None:
    rows = lines([{**row, "label": change(row["label"])} for row in piqa_rows(8)])
    check_rows("piqa", rows, tokenizer, context_length=512, part="training")
    task = load_task("piqa", rows)
    assert [right_choices(task, doc) for doc in task.training_docs()] == [[i % 2] for i in range(8)]


def test_rows_of_another_task_are_told_with_what_they_have(told: Callable[[str, list[Row]], str]) -> None:
    said = told("hellaswag", lines(piqa_rows(8)))
    assert said.startswith("task hellaswag: its rows don't fit lm-eval's definition")
    assert "mine.jsonl, line 2" in said
    assert "there are no training questions" in told("piqa", [])


def test_rows_that_are_shuffled_and_cut_know_their_line(tmp_path: Path, told: Callable[[str, list[Row]], str]) -> None:
    (tmp_path / "piqa").mkdir()
    given = [*piqa_rows(30)]
    given[2]["label"] = 7
    (tmp_path / "piqa" / "train.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, given)))
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, piqa_rows(40)[30:])))
    train, _ = questions.load(str(tmp_path), "piqa", wheel=None, train=50, evaluate=50, seed=0)
    assert train.index(given[2]) != 2
    assert told("piqa", train).startswith(f"task piqa, {tmp_path}/piqa/train.jsonl, line 6: ")


# --- files as others write them --------------------------------------------------------------------------


def as_parquet(file: Path, rows: list[Row]) -> None:
    Dataset.from_list(rows).to_parquet(str(file))


FILES: dict[str, Callable[[Path, list[Row]], Any]] = {
    "train.jsonl": lambda file, rows: file.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode()  # as Windows writes it
    ),
    "train.JSONL.GZ": lambda file, rows: file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "train.json": lambda file, rows: file.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig"),
    "train.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_questions_of_any_file_are_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    folder = tmp_path / "piqa"
    folder.mkdir()
    FILES[name](folder / name, piqa_rows(12))
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, piqa_rows(16)[12:])))
    (folder / "train.jsonl.dvc").write_text("what others put beside it")
    train, _ = questions.load(str(tmp_path), "piqa", wheel=None, train=50, evaluate=50, seed=0)
    assert sorted(row["goal"] for row in train) == sorted(str(row["goal"]) for row in piqa_rows(12))
    package = write_package(tmp_path / "package", tiny_model("llama"), tokenizer)
    assert not scaleot("tune", package, "--task", "piqa", "--data", folder / name, "--out", tmp_path / "a", *FEW).code
    bad = [{**row, "label": 7 if i == 4 else row["label"]} for i, row in enumerate(piqa_rows(12))]
    FILES[name](folder / name, bad)
    said = refused("tune", package, "--task", "piqa", "--data", folder / name, "--out", tmp_path / "b", *FEW)
    assert f"task piqa, {folder / name}, " in said and " 5: " in said and "`label` is 7" in said


def test_csv_serves_tasks_whose_fields_are_texts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, told: Callable[[str, list[Row]], str]
) -> None:
    file, given = tmp_path / "mine.csv", [{"question": "How, many?", "answer": "Two.\n#### 2"}, *RIGHT["gsm8k"]]
    write_csv(file, given, ["question", "answer"])
    rows = questions.read(file)
    assert [dict(row) for row in rows] == given
    check_rows("gsm8k", rows, tokenizer, context_length=512, part="training")
    write_csv(file, piqa_rows(4))
    assert f"{file}, line 2: " in (said := told("piqa", questions.read(file))) and "`label` is '0' (text)" in said


def test_two_files_of_one_part_are_refused(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    for name in ("train.json", "train.jsonl"):
        (tmp_path / "piqa" / name).write_text("[]")
    said = refusal(lambda: questions.load(str(tmp_path), "piqa", wheel=None, train=5, evaluate=5, seed=0))
    assert "both train.json and train.jsonl are there; keep one" in said


def test_empty_rows_are_left_out_at_the_command_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pages.jsonl").write_text('{"page": ""}\n{"page": "one"}\n')
    assert questions.private("wikitext", tmp_path / "pages.jsonl") == [{"page": "one"}]
    assert "1 of 2 rows are empty" in "".join(capsys.readouterr())


# --- names of tasks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_task_of_another_folder_is_found_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """BoolQ's definition lies in a folder of another name; all of lm-eval was indexed at every use."""
    made: list[Any] = []

    class Counted(lm_eval.tasks.TaskManager):
        def __init__(self, **options: Any) -> None:
            made.append(options)
            super().__init__(**options)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Counted)
    task_manager.cache_clear()
    for _ in range(3):
        assert task_config("boolq")["dataset_path"]
    assert len(made) <= 2 and all(options["include_defaults"] is False for options in made)


@pytest.mark.parametrize("name", ["PIQA", "arc_Easy", "Wikitext"])
def test_task_in_another_case_is_hinted_at(name: str) -> None:
    assert refusal(task_config, name) == f"tasks: {name!r} is no task of lm-eval; did you mean {name.lower()}?"


@pytest.mark.parametrize(("name", "tasks"), [("mmlu", "mmlu_abstract_algebra"), ("ai2_arc", "arc_challenge, arc_easy")])
def test_group_is_told_with_its_tasks(name: str, tasks: str) -> None:
    said = refusal(task_config, name)
    assert f"{name!r} is a group of" in said and f"name tasks, such as {tasks}" in said


def test_every_task_of_lm_eval_can_be_found_by_its_text() -> None:
    """As far as one folder goes: the names that the definitions say are those that lm-eval indexes."""
    packaged = Path(lm_eval.tasks.__file__).parent
    for folder in ("glue", "arc", "super_glue", "aradice"):
        names = set(definitions._all_names(packaged / folder))
        assert set(definitions._indexed(packaged / folder).all_subtasks) <= names
