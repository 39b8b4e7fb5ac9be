"""Continuations that share their context's run, beside lm-eval's own way of running each apart."""

from itertools import groupby

import pytest
import torch
from helpers import CONFIGS, tiny_model
from lm_eval.models.huggingface import HFLM

from scaleot_core.evaluation.scoring import Request, batches_of, make_rows, score
from scaleot_core.models.families import context_length, takes_positions
from scaleot_core.models.forward import last_hidden_state


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(longest: int) -> list[Request]:
    """Contexts of several lengths with one to five continuations of several lengths, some of them too long."""
    made = []
    for n, count in enumerate([1, 2, 5, 3, 4]):
        context = tokens([1, 3, 9, longest - 4, longest + 5][n], n)
        made += [(context, tokens([1, 4, 2, 7, 1][(n + k) % 5], 10 * n + k)) for k in range(count)]
    return [*made, made[0], (tokens(2, 77), tokens(longest, 78))]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_lm_eval(name, tokenizer, batch_size):
    model = tiny_model(name)
    longest, ticks = context_length(model.config), []
    asked = requests(longest)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=longest)
    expected = reference._loglikelihood_tokens([(("", ""), *pair) for pair in asked], disable_tqdm=True)
    found = score(model, asked, batch_size=batch_size, max_length=longest, tick=lambda **figures: ticks.append(figures))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert len(ticks) == len(asked)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_continuation_is_told(name):
    model = tiny_model(name)
    context = tokens(5, 0)
    likeliest = [int(model(torch.tensor([context])).logits[0, -1].argmax())]
    likeliest.append(int(model(torch.tensor([context + likeliest])).logits[0, -1].argmax()))
    other = [likeliest[0], (likeliest[1] + 1) % 60]
    asked = [(context, other), (context, likeliest), (context, likeliest[:1])]
    assert [hit for _, hit in score(model, asked, batch_size=8, max_length=32, tick=lambda **_: None)] == [
        False,
        True,
        True,
    ]


def test_context_runs_once_for_all_of_its_continuations():
    asked = requests(32)
    rows = make_rows(asked, 32)
    assert sorted(number for row in rows for number in row.continuations) == list(range(len(asked)))
    assert all(len(row) <= 32 for row in rows) and [len(row) for row in rows] == sorted(map(len, rows), reverse=True)
    of_third = [row for row in rows if row.context == asked[3][0]]
    assert len(of_third) == 1 and len(of_third[0]) == 9 + sum(len(asked[k][1]) - 1 for k in range(3, 8))
    sizes = [sum(len(row.continuations) for row in batch) for batch in batches_of(rows, 6)]
    assert max(sizes) <= 6 and sum(sizes) == len(asked)
    assert [row for batch in batches_of(rows, 6) for row in batch] == rows
    assert len(list(batches_of(rows, 1))) == len(rows) == len(list(groupby(rows, key=id)))


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if takes_positions(config)])
def test_positions_and_visibility_are_the_models_own_where_nothing_is_shared(name):
    model, sequence = tiny_model(name), torch.tensor([tokens(12, 3)])
    causal = torch.ones(1, 12, 12, dtype=torch.bool).tril()
    given = last_hidden_state(model, sequence, torch.arange(12)[None], causal)
    assert torch.allclose(given, last_hidden_state(model, sequence), atol=1e-6)
