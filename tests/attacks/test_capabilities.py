"""What models can do is measured as it is said, and its share above the floor is that of the way to the model."""

import math

import pytest
import torch
from helpers import piqa_rows, tiny_model

from scaleot_core.attacks.capabilities import Yardstick, chance, open_answers, share
from scaleot_core.attacks.membership import answers
from scaleot_core.evaluation.tasks import load_task
from scaleot_core.tuning.examples import from_task


@pytest.fixture
def asked(tokenizer):
    rows = piqa_rows(7)
    return rows, from_task(tiny_model("llama"), tokenizer, "piqa", rows, block_size=16)


def test_open_answers_are_those_of_a_forward_pass_a_question(asked):
    model, (_, data) = tiny_model("llama"), asked
    said = []  # as the model itself would answer, for some of them
    for k, (tokens, targets) in enumerate(data):
        greedy = model(torch.tensor([tokens])).logits[0].argmax(-1)
        own = [int(greedy[i]) if target != -100 and k % 2 else target for i, target in enumerate(targets)]
        said.append((tokens, own))
    assert 0 < sum(answer.extracted for answer in answers(model, said, 1, "test")) < 7
    nats = tokens = 0.0
    for inputs, targets in data:
        logits = model(torch.tensor([inputs])).logits[0]
        goal = torch.tensor([*inputs[1:], targets[-1]])
        nats += torch.nn.functional.cross_entropy(logits, goal, reduction="sum").item()
        tokens += len(goal)
    for size in (1, 3, 8):
        found = open_answers(model, data, size)
        assert found["text_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert found["answers"] == sum(answer.extracted for answer in answers(model, data, 1, "test")) / 7


def test_an_answer_that_the_model_gives_counts_whole_and_by_token(asked):
    model, (_, data) = tiny_model("llama"), asked
    tokens, targets = data[0]
    start = next(i for i, target in enumerate(targets) if target != -100)
    spoken = list(tokens[: start + 1])
    while len(spoken) <= len(tokens):
        spoken.append(int(model(torch.tensor([spoken])).logits[0, -1].argmax()))
    right = (spoken[:-1], [-100] * start + spoken[start + 1 :])
    assert open_answers(model, [right], 2) | {"text_perplexity": 0} == {
        "text_perplexity": 0,
        "answer_tokens": 1.0,
        "answers": 1.0,
    }
    wrong = (right[0], [*right[1][:-1], (right[1][-1] + 1) % 300])
    found = open_answers(model, [right, wrong], 2)
    length = len(tokens) - start
    assert found["answers"] == 0.5 and found["answer_tokens"] == pytest.approx(1 - 1 / (2 * length))


def test_share_is_of_the_way_from_the_floor_to_the_model():
    assert share(0.3, 0.5, 0.25) == pytest.approx(0.2) and share(0.2, 0.5, 0.25) < 0
    assert share(0.3, 0.25, 0.25) is None
    assert share(math.log(100.0), math.log(10.0), math.log(1000.0)) == pytest.approx(0.5)


def test_chance_is_that_of_the_choices(asked):
    rows, _ = asked
    assert chance(load_task("piqa", rows, rows)) == 0.5
    five = {"text": ["a", "b", "c", "d", "e"], "label": list("ABCDE")}
    other = [{"id": "1", "question": "Which?", "choices": five, "answerKey": "B"}] * 2
    assert chance(load_task("commonsense_qa_cloze", other, other)) == pytest.approx(0.2)


def test_yardstick_puts_the_model_at_one_and_the_floor_at_none(asked, tokenizer):
    rows, data = asked
    yardstick = Yardstick(tokenizer, {"piqa": rows}, {"piqa": data}, 4)
    model = {"perplexity": 20.0, **yardstick.measure(tiny_model("llama"), "test")}
    assert model["tasks"]["piqa"].keys() >= {"acc", "answer_nll"} and model["open"]["piqa"]["text_perplexity"] > 1
    guess = yardstick.uniform_guess(300)
    model["tasks"]["piqa"]["acc"] = 0.9
    assert yardstick.above_floor(model, model, guess) == {"corpus": 1.0, "piqa": {"text": 1.0, "acc": 1.0}}
    half = {**model, "perplexity": (300 * 20) ** 0.5, "tasks": {"piqa": {"acc": 0.7}}}
    found = yardstick.above_floor(half, model, guess)
    assert found["corpus"] == pytest.approx(0.5) and found["piqa"]["acc"] == pytest.approx(0.5)
    assert yardstick.above_floor(guess | {"tasks": {"piqa": {"acc": 0.5}}}, model, guess) == {
        "corpus": 0.0,
        "piqa": {"text": 0.0, "acc": 0.0},
    }
