"""Evaluation against log-likelihoods added up by hand."""

import math
from statistics import fmean, stdev

import pytest
import torch
from helpers import CLOZE, GSM8K, PAGES, ROOT, WEBQS, refusal, tiny_model

from scaleot_core.evaluation.harness import evaluate
from scaleot_core.models.forward import hooks
from scaleot_core.params import load_params
from scaleot_core.tuning.examples import from_task
from scaleot_core.tuning.tuner import train

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


# --- other kinds of tasks --------------------------------------------------------------------------------


def test_answers_of_which_several_are_right(tokenizer):
    figures = evaluate(tiny_model("llama"), tokenizer, {"webqs": WEBQS}, batch_size=3, label="test")["webqs"]
    nll = [
        min(
            -log_likelihood(tokenizer, f"Question: {row['question']}\nAnswer:", f" {answer}")
            for answer in row["answers"][:2]
        )
        for row in WEBQS  # the third answer begins as the second
    ]
    assert figures["answer_nll"] == pytest.approx(fmean(nll), rel=1e-5)
    assert figures["exact_match"] == 0 and figures["questions"] == len(WEBQS)


def long_model():
    """A tiny model with room for what lm-eval generates: up to 256 tokens."""
    return tiny_model("llama", max_position_embeddings=512)


@pytest.mark.slow
def test_generated_answers_are_matched_by_every_filter_and_their_likelihood_is_taken(tokenizer):
    figures = evaluate(long_model(), tokenizer, {"gsm8k": GSM8K}, batch_size=2, label="test")["gsm8k"]
    assert {name for name in figures if name.startswith("exact_match")} == {
        f"exact_match_{by}{end}" for by in ("strict-match", "flexible-extract") for end in ("", "_stderr")
    }
    nll = [-log_likelihood(tokenizer, f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in GSM8K]
    assert figures["answer_nll"] == pytest.approx(fmean(nll), rel=1e-5)
    assert figures["questions"] == len(GSM8K)


@pytest.mark.slow
def test_model_that_learnt_the_answers_by_heart_matches_them(tokenizer):
    model = long_model()
    data = from_task(model, tokenizer, "gsm8k", GSM8K, block_size=16)
    settings = load_params(ROOT / "params.yaml").offsite_tune.model_copy(update={"epochs": 300, "warmup_ratio": 0.0})
    train(model, dict(model.named_parameters()), data, settings, lr=1e-2, seed=0, label="test")
    figures = evaluate(model, tokenizer, {"gsm8k": GSM8K}, batch_size=2, label="test")["gsm8k"]
    assert figures["exact_match_strict-match"] == 1 and figures["answer_nll"] < 0.5


def test_perplexities_of_texts_are_what_the_equations_give(tokenizer):
    model, nll, tokens, words, batches = tiny_model("llama"), [], [], [], []
    ran = model.base_model.register_forward_hook(lambda m, args, out: batches.append(len(out.last_hidden_state)))
    with hooks(ran):
        figures = evaluate(model, tokenizer, {"wikitext": PAGES}, batch_size=3, label="test")["wikitext"]
    assert set(batches) == {1}  # no window is padded to another's length
    for row in PAGES:
        ids = tokenizer(row["page"].replace("\n ", "\n"))["input_ids"]  # as lm-eval takes such a page apart
        total, before = 0.0, [tokenizer.eos_token_id]
        for start in range(0, len(ids), 128):  # windows of the context's length, each after the token before it
            window = [*before, *ids[start : start + 128]]
            if len(window) < 129 and start:  # the last one is filled up from the left
                window = ids[-129:]
            fresh = min(128, len(ids) - start)
            logp = model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
            total -= sum(logp[t - 1, window[t]].item() for t in range(len(window) - fresh, len(window)))
            before = ids[start + 127 : start + 128]
        nll.append(total)
        tokens.append(len(ids))
        words.append(len(row["page"].split()))
    assert max(tokens) > 128
    assert figures["token_perplexity"] == pytest.approx(math.exp(sum(nll) / sum(tokens)), rel=1e-4)
    assert figures["word_perplexity"] == pytest.approx(math.exp(sum(nll) / sum(words)), rel=1e-3)
    spread = stdev([a - sum(nll) / sum(tokens) * b for a, b in zip(nll, tokens, strict=True)])
    error = figures["token_perplexity"] * spread / math.sqrt(6) / fmean(tokens)
    assert figures["token_perplexity_stderr"] == pytest.approx(error, rel=1e-3)
    assert figures["bits_per_byte_stderr"] > 0 and figures["questions"] == 6
