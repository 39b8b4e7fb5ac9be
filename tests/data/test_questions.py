"""A task's questions: disjoint parts, from each source."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import TEST_DATA, refusal
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.errors import UserError
from scaleot_core.data import embedded, questions
from scaleot_core.evaluation.tasks import check_rows, load_task

Row = dict[str, Any]


def rows(count: int, start: int = 0) -> list[Row]:
    return [{"goal": f"goal {i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(start, start + count)]


def goals(part: list[Row]) -> set[str]:
    return {row["goal"] for row in part}


def write_folder(folder: Path, task: str, **splits: list[Row]) -> Path:
    (folder / task).mkdir(parents=True)
    for name, part in splits.items():
        (folder / task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def test_split_is_disjoint_and_of_the_sizes_asked_for() -> None:
    train, evaluation = questions.split(rows(50), train=20, evaluate=10, seed=0)
    assert (len(train), len(evaluation)) == (20, 10)
    assert not goals(train) & goals(evaluation)


def test_split_takes_what_there_is() -> None:
    train, evaluation = questions.split(rows(15), train=100, evaluate=10, seed=0)
    assert (len(train), len(evaluation)) == (5, 10)


def test_seed_decides() -> None:
    first, again, other = (questions.split(rows(50), train=20, evaluate=10, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_evaluation_does_not_hang_on_the_training_size() -> None:
    small, large = (questions.split(rows(50), train=train, evaluate=10, seed=0) for train in (5, 40))
    assert small[1] == large[1] and small[0] == large[0][:5]


def test_a_question_given_twice_is_never_in_both() -> None:
    """Though its number, its case, its spacing, or even its answer differ."""
    again = [{**row, "goal": row["goal"].upper() + " ", "label": 1 - row["label"], "id": "x"} for row in rows(30)]
    for seed in range(5):
        train, evaluation = questions.split(rows(30) + again, train=100, evaluate=10, seed=seed)
        assert len(train) == 20
        assert not {goal.lower().strip() for goal in goals(train)} & {
            goal.lower().strip() for goal in goals(evaluation)
        }


def test_same_stem_with_other_options_is_another_question() -> None:
    train, _ = questions.split([*rows(10), *({**row, "sol1": "c"} for row in rows(10))], train=100, evaluate=5, seed=0)
    assert len(train) == 15


@pytest.mark.parametrize("count", [0, 5, 10])
def test_nothing_left_to_train_on(count: int) -> None:
    with pytest.raises(UserError, match=rf"data.eval_questions = 10: there are {count} questions"):
        questions.split(rows(count), train=5, evaluate=10, seed=0)


def test_cut_drops_training_questions_that_are_evaluated() -> None:
    train, evaluation = questions.cut("piqa", rows(40), rows(20, start=30), train=100, evaluate=5, seed=0)
    assert len(evaluation) == 5
    assert goals(train) == goals(rows(30))  # nothing of the whole evaluation split, whatever its cut


def test_rows_that_differ_in_what_is_asked_or_answered_all_stay() -> None:
    answers = [{"question": f"q {i}?", "answer": f"a {j}", "idx": j} for i in range(4) for j in range(5)]
    labels = [{"question": "q?", "label": k} for k in range(3)]
    other = [{"question": f"other {i}?", "answer": "a"} for i in range(3)]
    for train_rows in (answers, labels):
        train, evaluation = questions.cut("t", train_rows, other, train=100, evaluate=100, seed=0)
        assert (len(train), len(evaluation)) == (len(train_rows), 3)


def test_rows_that_are_left_out_are_told_by_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    questions.cut("piqa", [*rows(10), *rows(3)], rows(4, start=8), train=100, evaluate=100, seed=0)
    told = " ".join("".join(capsys.readouterr()).split())
    assert "task piqa: rows are left out: 3 come twice, 2 training questions are evaluated too" in told


def test_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "piqa", train=rows(30), validation=rows(10, start=30), test=rows(10, start=90))
    train, evaluation = questions.load(str(folder), "piqa", wheel=None, train=20, evaluate=50, seed=0)
    assert len(train) == 20
    assert goals(evaluation) == goals(rows(10, start=30))


def test_empty_rows_are_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [{"page": ""}, {"page": "one"}, {"page": " \n"}, {"page": "two"}]
    folder = write_folder(tmp_path, "wikitext", train=[{"page": "three"}], validation=pages)
    _, kept = questions.load(str(folder), "wikitext", wheel=None, train=9, evaluate=9, seed=0)
    assert sorted(row["page"] for row in kept) == ["one", "two"]
    assert "task wikitext: 2 of 4 rows are empty and left out" in "".join(capsys.readouterr())


def test_folder_with_a_test_split_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "piqa", train=rows(30), test=rows(10, start=30))
    assert len(questions.load(str(folder), "piqa", wheel=None, train=20, evaluate=50, seed=0)[1]) == 10


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"validation": rows(5)}, r"^task piqa: .*train\.jsonl: no such file"),
        ({"train": rows(5)}, r"^task piqa: .*validation\.jsonl: no such file"),
        ({"train": rows(5), "validation": []}, "^data.questions = '.*': task piqa: it has no evaluation question"),
        ({"train": rows(5), "validation": rows(5)}, "^data.questions = '.*': task piqa: it has no training question"),
    ],
)
def test_folder_that_lacks_a_part(tmp_path: Path, splits: dict[str, list[Row]], said: str) -> None:
    folder = write_folder(tmp_path, "piqa", **splits)
    with pytest.raises(UserError, match=said):
        questions.load(str(folder), "piqa", wheel=None, train=20, evaluate=5, seed=0)


def test_folder_that_lacks_a_part_is_told_before_the_model_is_fetched(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "piqa", train=rows(5), test=rows(5))
    questions.check(str(folder), "piqa")
    (folder / "piqa" / "train.jsonl").unlink()
    said = refusal(questions.check, str(folder), "piqa")
    assert said == f"data.questions = '{folder}': task piqa: {folder}/piqa/train.jsonl: no such file"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_row_of_a_folder_that_lacks_a_field_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, split: str
) -> None:
    splits = {"train": rows(30), "validation": rows(10, start=30)}
    del splits[split][6]["goal"]
    folder = write_folder(tmp_path, "piqa", **splits)
    parts = questions.load(str(folder), "piqa", wheel=None, train=30, evaluate=10, seed=0)
    part = parts[split == "validation"]
    message = refusal(lambda: check_rows("piqa", part, tokenizer, context_length=128, part="training"))
    assert message.startswith(f"task piqa, {folder}/piqa/{split}.jsonl, line 7: ") and "'goal' is undefined" in message


def test_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "questions", lambda wheel, task: rows(30))
    train, evaluation = questions.load("embedded", "piqa", wheel=tmp_path, train=10, evaluate=10, seed=0)
    assert (len(train), len(evaluation)) == (10, 10)


def fake_hub(monkeypatch: pytest.MonkeyPatch, config: Row, splits: dict[str, list[Row]]) -> list[tuple[Any, ...]]:
    """Stands for lm-eval's definition and for the hub; returns the list that calls are noted in."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, **options: Any) -> SimpleNamespace:
        calls.append((path, name, split, options))
        if split not in splits:
            raise ConnectionError("no way\nthere")
        return SimpleNamespace(to_list=lambda: splits[split])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("scaleot_core.data.questions.task_config", lambda task: config)
    return calls


CONFIG = {"dataset_path": "some/set", "dataset_name": "main", "training_split": "train", "validation_split": "dev"}


@pytest.mark.parametrize(("test_split", "evaluated"), [(None, "dev"), ("test", "test")])
def test_hub_reads_the_splits_that_lm_eval_scores(
    monkeypatch: pytest.MonkeyPatch, test_split: str | None, evaluated: str
) -> None:
    config = {**CONFIG, "test_split": test_split, "dataset_kwargs": {"revision": "x"}}
    splits = {"train": rows(30), "dev": rows(5, start=50), "test": rows(6, start=60)}
    calls = fake_hub(monkeypatch, config, splits)
    train, evaluation = questions.load("hub", "piqa", wheel=None, train=10, evaluate=10, seed=0)
    assert len(train) == 10 and goals(evaluation) == goals(splits[evaluated])
    assert calls == [("some/set", "main", split, {"revision": "x"}) for split in (evaluated, "train")]


def test_hub_out_of_reach_is_an_error_and_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, CONFIG, {})
    monkeypatch.setattr(embedded, "questions", lambda *args: pytest.fail("fell back"))
    with pytest.raises(UserError, match=r"some/set can't be loaded from the hub \(no way\)$"):
        questions.load("hub", "piqa", wheel=None, train=10, evaluate=10, seed=0)


def test_race_is_trained_on_articles_that_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        {
            "article": f"a{i // 3}",
            "question": f"q{i}",
            "answer": "ABCD"[i % 4],
            "options": ["w", "x", "y", "z"],
            "id": i,
        }
        for i in range(9)
    ]
    whole = [{"article": "b", "problems": "[{'question': 'q', 'answer': 'A', 'options': ['w', 'x', 'y', 'z']}]"}] * 2
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str, *, split: str) -> SimpleNamespace:
        calls.append((path, name, split))
        return SimpleNamespace(to_list=lambda: asked if split == "train" else whole)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    train, evaluation = questions.hub("race")
    assert calls == [("EleutherAI/race", "high", "test"), ("ehovy/race", "high", "train")]
    assert evaluation == whole and [row["article"] for row in train] == ["a0", "a1", "a2"]
    task = load_task("race", train)
    assert [task.doc_to_target(row) for row in train] == [2, 1, 0]  # of an article's last question
    assert "q3" in task.doc_to_text(train[1]) and "q5" in task.doc_to_text(train[1])


def test_task_without_a_training_split_is_refused_only_where_the_hub_would_have_to_give_it() -> None:
    questions.check("here", "truthfulqa_mc1")
    questions.check("hub", "race")
    with pytest.raises(UserError, match="'truthfulqa_mc1' has no training split"):
        questions.check("hub", "truthfulqa_mc1")


@pytest.mark.slow
@pytest.mark.skipif(not (TEST_DATA / "piqa").is_dir(), reason="the lab data isn't here")
@pytest.mark.parametrize(
    "task", ["piqa", "openbookqa", "arc_easy", "arc_challenge", "hellaswag", "sciq", "webqs", "race"]
)
def test_real_slices_have_no_question_in_both(task: str) -> None:
    train, evaluation = questions.load(str(TEST_DATA), task, wheel=None, train=10**6, evaluate=200, seed=0)
    assert len(evaluation) == 200 and len(train) >= 500
    asked = [{questions._key(row, questions.IDS | questions.ANSWERS) for row in rows} for rows in (train, evaluation)]
    assert asked[0].isdisjoint(asked[1])
