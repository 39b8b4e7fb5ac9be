"""Tasks are lm-eval's own, on our rows; a task or a row that can't be used is named."""

from copy import deepcopy

import pytest
from helpers import CLOZE, GSM8K, WEBQS, piqa_rows, refusal

from scaleot_core.evaluation import tasks
from scaleot_core.evaluation.tasks import answer_pairs, check_rows, load_task, metrics, right_choices, texts


@pytest.fixture
def pairs(tokenizer):
    return lambda task, rows: answer_pairs(load_task(task, rows), tokenizer, context_length=64)


def test_rows_are_those_of_their_split():
    train, evaluation = piqa_rows(5), piqa_rows(9)[5:]
    task = load_task("piqa", train, evaluation)
    assert task.training_docs().to_list() == train
    assert task.eval_docs.to_list() == evaluation
    assert load_task("piqa", train).eval_docs.to_list() == train  # the data owner has no others


@pytest.mark.parametrize(("task", "rows"), [("piqa", piqa_rows(7)), ("commonsense_qa_cloze", CLOZE)])
def test_answer_pairs_are_what_lm_eval_requests_for_the_right_answers(task, rows, tokenizer):
    loaded = load_task(task, rows, rows)
    loaded.build_all_requests()
    right = [row["label"] if task == "piqa" else "ABCDE".index(row["answerKey"]) for row in rows]
    requested = {(request.doc_id, request.idx): request.args for request in loaded.instances}
    pairs = answer_pairs(loaded, tokenizer, context_length=64)
    assert pairs == [requested[i, answer] for i, answer in enumerate(right)]
    assert all(continuation.startswith(" ") for _, continuation in pairs)


def test_piqa_reads_as_published(pairs):
    assert pairs("piqa", piqa_rows(2)) == [
        ("Question: count to 0\nAnswer:", " say one to 0"),
        ("Question: count to 1\nAnswer:", " say 1 to one"),
    ]


def test_cloze_asks_for_the_answers_themselves_and_scores_them():
    task = load_task("commonsense_qa_cloze", CLOZE, CLOZE)
    task.build_all_requests()
    asked = [request.args for request in task.instances if request.doc_id == 3]
    assert asked == [("Question: What comes after 3?\nAnswer:", f" {3 + k} or so") for k in range(5)]
    for best in range(5):
        figures = task.process_results(CLOZE[3], [(-1.0 if k == best else -2.0, False) for k in range(5)])
        assert figures["acc"] == figures["acc_norm"] == (best == 3)


# --- other kinds of tasks --------------------------------------------------------------------------------

WINOGRANDE = [
    {"sentence": f"{i} beats _ .", "option1": "one", "option2": "two", "answer": str(i % 2 + 1)} for i in range(4)
]


def test_generated_answer_is_what_the_definition_gives(pairs):
    assert pairs("gsm8k", GSM8K)[2] == ("Question: 2 + 1?\nAnswer:", " it is 3 #### 3")
    assert "training row 2: the answer is empty" in refusal(pairs, "gsm8k", [GSM8K[0], {**GSM8K[1], "answer": " "}])
    assert "training row 2: the answer is empty" in refusal(pairs, "gsm8k", [GSM8K[0], {**GSM8K[1], "answer": None}])
    message = refusal(pairs, "gsm8k", [GSM8K[0], {**GSM8K[1], "question": None}])
    assert "training row 2: lm-eval's definition can't use the row ('question' is undefined)" in message


def test_context_too_short_to_generate_is_told(tokenizer):
    check_rows("gsm8k", GSM8K, tokenizer, context_length=257, part="training")
    message = refusal(lambda: check_rows("gsm8k", GSM8K, tokenizer, context_length=256, part="training"))
    assert message.startswith("task gsm8k: it generates up to 256 tokens, and the model's context is 256")


def test_first_of_several_right_answers_is_tuned_on(pairs):
    assert pairs("webqs", WEBQS)[1] == ("Question: where is 1?\nAnswer:", " city 1")  # lm-eval sorts them
    doc = deepcopy(WEBQS[1])  # whose answers lm-eval sorts in place
    assert right_choices(load_task("webqs", WEBQS), doc) == [0, 1]  # the third begins as the first
    assert "training row 2" in refusal(pairs, "webqs", [WEBQS[0], {**WEBQS[1], "answers": []}])


def test_choices_that_stand_in_the_context(pairs):
    """WinoGrande scores one continuation after each choice."""
    assert pairs("winogrande", WINOGRANDE)[:2] == [("0 beats one", " ."), ("1 beats two", " .")]


def test_metrics_are_listed_with_what_is_better():
    assert metrics(load_task("piqa", piqa_rows(2))) == {"acc": True, "acc_norm": True, "answer_nll": False}
    assert metrics(load_task("webqs", WEBQS)) == {"exact_match": True, "answer_nll": False}
    assert list(metrics(load_task("gsm8k", GSM8K))) == [
        "exact_match_strict-match",
        "exact_match_flexible-extract",
        "answer_nll",
    ]
    text = {"word_perplexity": False, "byte_perplexity": False, "bits_per_byte": False, "token_perplexity": False}
    assert metrics(load_task("wikitext", [{"page": "a"}])) == text


def test_texts_are_what_the_definition_scores():
    assert texts(load_task("wikitext", [{"page": "a @-@ b"}, {"page": "c"}])) == ["a-b", "c"]
    assert "training row 2: its text is empty" in refusal(
        lambda: texts(load_task("wikitext", [{"page": "a"}, {"page": " "}]))
    )


ROW = piqa_rows(1)[0]


def without(field):
    return {key: value for key, value in ROW.items() if key != field}


@pytest.mark.parametrize(
    "bad",
    [{**ROW, "label": label} for label in (2, -1, None)]
    + [{**ROW, choice: text} for choice in ("sol1", "sol2") for text in ("", " ", None)]
    + [without(field) for field in ROW],
    ids=repr,
)
def test_row_without_its_answer_or_a_choice_is_named(pairs, bad):
    assert "task piqa, training row 3" in refusal(pairs, "piqa", [*piqa_rows(2), bad, ROW])


NO_TEXT = {"label": list("ABCDE"), "text": ["a", "b", None, "d", "e"]}


@pytest.mark.parametrize("fields", [{"answerKey": "F"}, {"answerKey": ""}, {"answerKey": "a"}, {"choices": NO_TEXT}])
def test_answer_that_is_none_of_the_choices_is_named(pairs, fields):
    message = refusal(pairs, "commonsense_qa_cloze", [*CLOZE[:2], {**CLOZE[2], **fields}])
    assert "task commonsense_qa_cloze, training row 3" in message


@pytest.mark.parametrize("choice", ["sol1", "sol2"])
def test_choice_longer_than_the_context_is_named(pairs, choice):
    fits, too_long = ({**ROW, choice: "x" * count} for count in (63, 64))  # a token each, and one for the space
    assert len(pairs("piqa", [*piqa_rows(2), fits])) == 3
    message = refusal(pairs, "piqa", [*piqa_rows(2), too_long])
    assert message.startswith(f"task piqa, training row 3: choice {choice[-1]} has 65 tokens") and "64" in message


def test_rows_of_another_task_are_refused(pairs):
    assert "task piqa, training row 1: lm-eval's definition can't use" in refusal(pairs, "piqa", CLOZE)


def test_definition_whose_import_fails_is_told_and_no_row_is_blamed(monkeypatch):
    def build(*args: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'gone'")

    monkeypatch.setattr(tasks, "_build", build)
    message = refusal(load_task, "piqa", piqa_rows(3))
    assert message == "task piqa: lm-eval's definition doesn't run here (No module named 'gone')"
