"""Evaluation against log-likelihoods added up by hand."""

import math
from statistics import fmean, stdev

import pytest
import torch
from conftest import tiny_model
from test_files import refusal
from test_tasks import CLOZE

from scaleot_core.evaluation import evaluate

# answers of many lengths, so that accuracy is not the same with and without dividing by them
PIQA = [
    {"goal": f"say {i}", "sol1": "yes " * (i % 3 + 1), "sol2": "no" + "o" * (i * 5 % 7), "label": i // 2 % 2}
    for i in range(12)
]


@pytest.fixture(scope="module")
def figures(tokenizer):
    questions = {"piqa": PIQA, "commonsense_qa_cloze": CLOZE}
    return evaluate(tiny_model("llama"), tokenizer, questions, batch_size=5, label="test")


def log_likelihood(tokenizer, context, answer) -> float:
    """Of every token of the answer given all before it, one question at a time."""
    model = tiny_model("llama")
    before, whole = (tokenizer(text)["input_ids"] for text in (context, context + answer))
    logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logp[t - 1, whole[t]].item() for t in range(len(before), len(whole)))


def by_hand(tokenizer, context, choices):
    """Log-likelihoods of the choices, and the same per character."""
    found = [log_likelihood(tokenizer, context, f" {choice}") for choice in choices]
    return found, [ll / len(choice) for ll, choice in zip(found, choices, strict=True)]


def check(figures, scored, answers):
    """`scored` has each question's (log-likelihoods, the same per character)."""
    acc, acc_norm = (
        [float(max(range(len(q[which])), key=q[which].__getitem__) == a) for q, a in zip(scored, answers, strict=True)]
        for which in (0, 1)
    )
    nll = [-likelihoods[a] for (likelihoods, _), a in zip(scored, answers, strict=True)]
    for name, values in {"acc": acc, "acc_norm": acc_norm, "answer_nll": nll}.items():
        assert figures[name] == pytest.approx(fmean(values), rel=1e-5), name
        assert figures[f"{name}_stderr"] == pytest.approx(stdev(values) / math.sqrt(len(values)), rel=1e-4), name
    return acc, acc_norm


def test_piqa_is_what_the_equations_give(figures, tokenizer):
    scored = [by_hand(tokenizer, f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]) for row in PIQA]
    acc, acc_norm = check(figures["piqa"], scored, [row["label"] for row in PIQA])
    assert acc != acc_norm and 0 < fmean(acc) < 1  # these questions tell the metrics apart


def test_cloze_is_what_the_equations_give(figures, tokenizer):
    contexts = [f"Question: {row['question'].strip()}\nAnswer:" for row in CLOZE]
    scored = [by_hand(tokenizer, c, row["choices"]["text"]) for c, row in zip(contexts, CLOZE, strict=True)]
    check(figures["commonsense_qa_cloze"], scored, ["ABCDE".index(row["answerKey"]) for row in CLOZE])


def test_figures_are_numbers_with_their_errors_and_versions(figures):
    metrics = {"acc", "acc_norm", "answer_nll"}
    for name, rows in (("piqa", PIQA), ("commonsense_qa_cloze", CLOZE)):
        assert figures[name].keys() == metrics | {f"{m}_stderr" for m in metrics} | {"questions", "version"}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in figures[name].values())
        assert figures[name]["questions"] == len(rows) and figures[name]["version"] == 1.0


def test_one_question_has_no_standard_error(tokenizer):
    said = refusal(lambda: evaluate(tiny_model("llama"), tokenizer, {"piqa": PIQA[:1]}, batch_size=1, label="test"))
    assert "task piqa" in said and "data.eval_questions" in said


def test_likelihood_that_is_no_number_is_refused(tokenizer):
    model = tiny_model("llama")
    model.model.norm.weight.fill_(math.nan)
    said = refusal(lambda: evaluate(model, tokenizer, {"piqa": PIQA[:2]}, batch_size=2, label="test"))
    assert "task piqa" in said and "not finite" in said
