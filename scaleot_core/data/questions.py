"""A task's questions, split: disjoint training and evaluation parts, embedded, from the hub, or from a folder."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.progress import say
from scaleot_core.common.random import generator
from scaleot_core.data import embedded
from scaleot_core.data.local_files import split_file
from scaleot_core.data.rows import read_rows
from scaleot_core.evaluation.definitions import evaluated_split, task_config
from scaleot_core.evaluation.fields import PlacedRow

Row = dict[str, Any]
IDS = {"id", "idx", "ind", "source_id", "example_id"}  # never a part of a question
ANSWERS = {"label", "answerKey", "answer", "answers"}  # mostly none either, and they have two encodings


def _key(row: Row, ignored: set[str]) -> str:
    """Return a row's content as text that is the same whatever its case, its spacing and the ignored fields."""
    content = {name: value for name, value in row.items() if name not in ignored}
    return json.dumps(embedded.plain(content), sort_keys=True, ensure_ascii=False, default=str)


def _unique(rows: list[Row], ignored: set[str]) -> list[Row]:
    """Keep the first of rows that are equal but for the ignored fields."""
    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(_key(row, ignored), row)
    return list(unique.values())


def _shuffled(rows: list[Row], seed: int, part: str) -> list[Row]:
    """Shuffle rows by the seed."""
    return [rows[i] for i in torch.randperm(len(rows), generator=generator(seed, "questions", part)).tolist()]


def split(rows: list[Row], *, train: int, evaluate: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Cut one set of rows into at most `train` and `evaluate` of them, with no question in both.

    Of equal questions, whatever their answers, the first is kept. Evaluation is filled first, so that it stays the same
    whatever the training size. UserError where nothing is left to train on.
    """
    shuffled = _shuffled(_unique(rows, IDS | ANSWERS), seed, "split")
    if len(shuffled) <= evaluate:
        raise UserError(
            f"there are {len(shuffled)} questions, so none is left to train on; lower it",
            parameter="data.eval_questions",
            value=evaluate,
        )
    return shuffled[evaluate : evaluate + train], shuffled[:evaluate]


def cut(
    task: str, train_rows: list[Row], eval_rows: list[Row], *, train: int, evaluate: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Cut two splits to size. Rows that differ in what is asked or answered are different rows.

    What is left out is told by its number: rows that come twice, and training questions that are evaluated too.
    """
    trained, evaluated = (_unique(rows, IDS) for rows in (train_rows, eval_rows))
    asked = {_key(row, IDS | ANSWERS) for row in evaluated}
    disjoint = [row for row in trained if _key(row, IDS | ANSWERS) not in asked]
    twice = len(train_rows) + len(eval_rows) - len(trained) - len(evaluated)
    if left_out := [f"{twice} come twice"] * (twice > 0) + [
        f"{len(trained) - len(disjoint)} training questions are evaluated too"
    ] * (len(disjoint) < len(trained)):
        say(f"task {task}: rows are left out: {', '.join(left_out)}", style="yellow")
    return _shuffled(disjoint, seed, "train")[:train], _shuffled(evaluated, seed, "evaluation")[:evaluate]


def local(folder: Path, task: str) -> tuple[list[Row], list[Row]]:
    """Read both splits of `<folder>/<task>/`: train.jsonl, and validation.jsonl or, without one, test.jsonl.

    Other files of rows will do as well, such as train.parquet. UserError for a missing or malformed file.
    """
    train, evaluated = _split_files(folder, task)
    return read(train), read(evaluated)


def _split_files(folder: Path, task: str) -> tuple[Path, Path]:
    train, validation, test = (split_file(folder / task, part) for part in ("train", "validation", "test"))
    return train, test if test.is_file() and not validation.is_file() else validation


def read(file: Path) -> list[Row]:
    """Read the rows of one's own file, which know where they lie in it."""
    return [PlacedRow(row, where) for where, row in read_rows(file)]


def private(task: str, file: Path | None) -> list[Row]:
    """Read the data owner's questions of a task: of a file, or, without one, the training questions on the hub."""
    return _drop_empty(task, training(task) if file is None else read(file))


def _group_by_article(rows: list[Row]) -> list[Row]:
    """Group RACE's questions by article, as lm-eval's data set has them."""
    articles: dict[str, list[Row]] = {}
    for row in rows:
        problem = {name: row[name] for name in ("question", "answer", "options")}
        articles.setdefault(row["article"], []).append(problem)
    return [{"article": article, "problems": repr(problems)} for article, problems in articles.items()]


# Where the hub has training questions that lm-eval's own data set lacks, and how they become its rows.
HUB_OVERRIDES = {"race": ("ehovy/race", "high", "train", _group_by_article)}


def check(source: str, task: str) -> None:
    """Raise UserError if a task is unknown, can't be tuned and scored, or has no questions to tune on at a source."""
    config = task_config(task)
    if source == "hub" and config["training_split"] is None and task not in HUB_OVERRIDES:
        raise UserError(f"{task!r} has no training split, so nothing can be tuned on it", parameter="tasks")
    if source not in ("embedded", "hub") and Path(source).is_dir():
        for file in _split_files(Path(source), task):
            if not file.is_file():
                raise UserError(f"task {task}: {file}: no such file", parameter="data.questions", value=source)


def _options(config: Mapping[str, Any], revision: str) -> dict[str, Any]:
    """Return a definition's options for `load_dataset`; our revision overrides its own."""
    return {**(config.get("dataset_kwargs") or {}), **({"revision": revision} if revision else {})}


def training(task: str, revision: str = "") -> list[Row]:
    """Load a task's training questions from the hub; UserError if it has none, or they can't be loaded."""
    from datasets import load_dataset

    check("hub", task)
    config = task_config(task)
    path, name, split, regroup = HUB_OVERRIDES.get(
        task, (config["dataset_path"], config.get("dataset_name"), config["training_split"], None)
    )
    options = {} if regroup else _options(config, revision)
    with _reachable(path):
        rows = load_dataset(path, name, split=split, **options).to_list()
    return _placed(regroup(rows) if regroup else rows, f"{path} ({split})")


def hub(task: str, revision: str = "") -> tuple[list[Row], list[Row]]:
    """Load the training split and the evaluated one that lm-eval's definition of the task names, from the hub.

    UserError for an unknown task and for a data set that can't be loaded.
    """
    from datasets import load_dataset

    config = task_config(task)
    path, options = config["dataset_path"], _options(config, revision)
    with _reachable(path):
        split = evaluated_split(config)
        rows = load_dataset(path, config.get("dataset_name"), split=split, **options).to_list()
    return training(task, revision), _placed(rows, f"{path} ({split})")


def _placed(rows: list[Row], where: str) -> list[Row]:
    return [PlacedRow(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


@contextmanager
def _reachable(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network, the hub and each file format have their own types
        raise UserError(f"{path} can't be loaded from the hub ({one_line(error)})") from error


def _drop_empty(task: str, rows: list[Row]) -> list[Row]:
    """Leave out rows of empty fields, such as a page of WikiText's validation split on the hub."""
    filled = [row for row in rows if any(str(value).strip() for value in row.values())]
    if len(filled) < len(rows):
        say(f"task {task}: {len(rows) - len(filled)} of {len(rows)} rows are empty and left out", style="yellow")
    return filled


def load(
    source: str, task: str, *, revision: str = "", wheel: Path | None, train: int, evaluate: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Load at most `train` training and `evaluate` evaluation rows of a task, in the fields of its hub data set.

    `source` is `embedded` (then `wheel` holds them), `hub`, or a folder; none stands in for another. UserError where a
    source can't be read or a part comes out empty.
    """
    try:
        if source == "embedded":
            assert wheel is not None
            parts = split(embedded.questions(wheel, task), train=train, evaluate=evaluate, seed=seed)
        else:
            splits = hub(task, revision) if source == "hub" else local(Path(source), task)
            train_rows, eval_rows = (_drop_empty(task, rows) for rows in splits)
            parts = cut(task, train_rows, eval_rows, train=train, evaluate=evaluate, seed=seed)
    except UserError as error:
        raise error.within(f"task {task}") from error
    for name, rows in zip(("training", "evaluation"), parts, strict=True):
        if not rows:
            raise UserError(f"task {task}: it has no {name} question", parameter="data.questions", value=source)
    if len(parts[1]) < 2:
        raise UserError(
            f"task {task}: a standard error needs two evaluation questions; give more, or raise data.eval_questions"
        )
    return parts
