"""The budgets study: the law that it fits is the one that is there, and its interval holds what comes."""

import numpy as np
import pytest

from scaleot_core.common.errors import UserError
from studies import budgets

TOKENS = [8_192, 16_384, 32_768, 65_536, 131_072]


def test_power_law_is_found_again():
    law = budgets.fit(TOKENS, [3.0 * tokens**-0.25 for tokens in TOKENS])
    assert law.slope == pytest.approx(-0.25) and law.slope_stderr < 1e-6
    value, low, high = law.predict(100 * TOKENS[-1], 0.95)
    assert value == pytest.approx(3.0 * (100 * TOKENS[-1]) ** -0.25)
    assert low == pytest.approx(value) == pytest.approx(high)


def test_interval_holds_a_new_attack_as_often_as_it_says():
    draw, held, rounds = np.random.default_rng(0), 0, 400
    for _ in range(rounds):
        *seen, after = 3.0 * np.array([*TOKENS, 100 * TOKENS[-1]]) ** -0.25 * np.exp(draw.normal(0, 0.05, 6))
        _, low, high = budgets.fit(TOKENS, seen).predict(100 * TOKENS[-1], 0.9)
        held += low < after < high
    assert 0.86 < held / rounds < 0.94


def test_what_makes_no_curve_is_refused():
    with pytest.raises(UserError, match="2 of them make no curve"):
        budgets.fit(TOKENS[:2], [1.0, 0.9])
    with pytest.raises(UserError, match="reached the model's loss"):
        budgets.fit(TOKENS[:3], [1.0, 0.5, -0.1])


def test_budgets_are_those_that_were_given_or_of_the_settings():
    assert budgets.budgets(["32", "8", "16"], [64]) == [8, 16, 32]
    assert budgets.budgets([], [64, 256, 128]) == [64, 128, 256]
    with pytest.raises(UserError, match="'many' is no number of steps"):
        budgets.budgets(["8", "many"], [64])
    with pytest.raises(UserError, match="2 budgets make no curve"):
        budgets.budgets(["8", "16"], [64])


def test_every_package_has_its_own_line():
    rows = [
        {
            "package": package,
            "alpha": 0.25,
            "beta": 0.8,
            "channels": 0.0,
            "tokens": t,
            "loss": 2 + a * t**-b,
            "model loss": 2,
        }
        for package, a, b in (("one", 3.0, 0.25), ("two", 5.0, 0.1))
        for t in map(float, TOKENS)
    ]
    shown = budgets.table(rows, 100, 0.95)
    slopes, last = (list(shown.columns[k].cells) for k in (6, 7))
    assert [slope.split(" ")[0] for slope in slopes] == ["-0.250", "-0.100"]
    assert last[0].startswith(f"{3.0 * (100 * TOKENS[-1]) ** -0.25:.3f} (")
