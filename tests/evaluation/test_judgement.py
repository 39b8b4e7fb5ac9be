"""A task is refused whose definition scores its own answers as wrong."""

from types import SimpleNamespace

import pytest
from helpers import CLOZE, GSM8K, WEBQS, piqa_rows, refusal

from scaleot_core.evaluation.judgement import JUDGED, check_answers
from scaleot_core.evaluation.tasks import check_rows

WINOGRANDE = [
    {"sentence": "A beats _ .", "option1": "one", "option2": "two", "answer": str(1 + i % 2)} for i in range(4)
]


def drop_row(number):
    answer = {
        "number": number,
        "date": {"day": "", "month": "", "year": ""},
        "spans": [],
        "worker_id": "",
        "hit_id": "",
    }
    validated = {key: [value] for key, value in answer.items()}
    ids = {"section_id": "s", "query_id": number, "passage": "p", "question": f"{number}?"}
    return {**ids, "answer": answer, "validated_answers": validated}


def check(task, rows, tokenizer):
    check_rows(task, rows, tokenizer, context_length=512, part="training")


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("piqa", piqa_rows(3)),
        ("commonsense_qa_cloze", CLOZE),
        ("winogrande", WINOGRANDE),
        ("webqs", WEBQS),
        ("gsm8k", GSM8K),
        ("gsm8k", [{**GSM8K[0], "answer": "one, as I think"}, *GSM8K]),
        ("wikitext", [{"page": "a"}]),
    ],
)
def test_task_whose_definition_accepts_its_answers_is_taken(task, rows, tokenizer):
    check(task, rows, tokenizer)


def test_task_whose_answer_its_own_definition_scores_as_wrong_is_refused(tokenizer):
    message = refusal(check, "drop", [drop_row("2"), drop_row("3")], tokenizer)
    assert message.startswith("task drop: lm-eval's definition scores its own answer 'number,date,")
    assert message.endswith("as wrong (em 0, f1 0), so tuning on it can't help; use another task")
    rows = [{"question": "1 + 1?", "answer": "two"}] * 2  # no number, which the definition looks for
    assert "'two' as wrong" in refusal(check, "gsm8k", rows, tokenizer).replace("' two'", "'two'")


class Stub:
    """A definition that scores what it is given by a function."""

    OUTPUT_TYPE = "generate_until"

    def __init__(self, score, until=()):
        self.score, self.judged = score, 0
        self.config = SimpleNamespace(task="stub", generation_kwargs={"until": until}, repeats=1)
        chosen = lambda requests: [request.filtered_resps.update(f=request.resps[0]) for request in requests]  # noqa: E731
        self._filters = [SimpleNamespace(name="f", apply=chosen)]

    def fewshot_context(self, doc, count):
        return ""

    def construct_requests(self, doc, context, metadata):
        self.judged += 1
        return SimpleNamespace(filtered_resps={}, resps=[])

    def higher_is_better(self):
        return {"error": False}

    def process_results(self, doc, results):
        return self.score(results[0])


def judge(task, *answers):
    check_answers(task, [({}, ("", answer)) for answer in answers])


def test_answer_is_judged_as_it_would_be_generated():
    """Up to where generation stops, and without the blank, which some tokenizers lose."""
    judge(Stub(lambda text: {"exact_match": text == "two"}, until=["\n", ""]), " two\nmore")
    judge(Stub(lambda text: {"exact_match": text == " two"}, until="."), " two.")


def test_few_answers_are_judged_and_one_that_is_right_will_do():
    task = Stub(lambda text: {"exact_match": text == "9"})
    judge(task, *["1"] * (JUDGED - 1), "9", "1")
    assert task.judged == JUDGED
    assert "'1' as wrong (exact_match 0)" in refusal(judge, task, *["1"] * JUDGED, "9")


def test_figures_that_tell_nothing_of_one_answer_refuse_none():
    judge(Stub(lambda text: {"bleu": ("a", text)}), "b")
    judge(Stub(lambda text: {"bleu": ("a", text), "error": 0.0}), "b")


def test_definition_that_cannot_score_its_answer_is_one_line():
    message = refusal(judge, Stub(lambda text: {"acc": 1 / 0}), "b")
    assert (
        message == "task stub: lm-eval's definition can't score its own answer 'b' (division by zero); use another task"
    )
