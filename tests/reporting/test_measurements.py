"""What the measurements come to: gap, recovery, and their order."""

import pytest
from reported import GOOD, measured, perplexity

from scaleot_core.reporting import measurements


def test_gap_and_recovery_follow_their_equations():
    found = measurements.utility(GOOD)
    assert found["gap"] == pytest.approx({"acc": 0.06, "answer_nll": 6.0})
    assert found["recovery"] == pytest.approx({"acc": 0.8, "answer_nll": 0.8})


def test_worse_plug_in_is_negative_in_every_metric():
    found = measurements.utility(measured([0.50, 0.60, 0.40, 0.52, 0.45], [20.0, 10.0, 30.0, 18.0, 25.0]))
    assert found["gap"] == pytest.approx({"acc": -0.07, "answer_nll": -7.0})
    assert found["recovery"] == pytest.approx({"acc": -0.5, "answer_nll": -0.5})


@pytest.mark.parametrize("ceiling", [0.50, 0.45])
def test_recovery_is_none_where_full_finetuning_gained_nothing(ceiling):
    found = measurements.utility(measured([0.50, ceiling, 0.40, 0.52, 0.58], [20.0, 10.0, 30.0, 18.0, 12.0]))
    assert found["recovery"]["acc"] is None and found["recovery"]["answer_nll"] == pytest.approx(0.8)
    assert found["gap"]["acc"] == pytest.approx(0.06)


def test_less_perplexity_is_better():
    found = measurements.utility(perplexity([30.0, 20.0, 60.0, 40.0, 25.0]))
    assert found == {"gap": {"perplexity": 15.0}, "recovery": {"perplexity": 0.5}}
    assert measurements.misordered(perplexity([30.0, 20.0, 60.0, 40.0, 35.0])) == [
        "plug_in is not better than zero_shot in perplexity"
    ]


@pytest.mark.parametrize(
    ("acc", "nll", "said"),
    [
        (0.58, 12.0, []),
        (0.51, 12.0, ["emulator_finetune in acc"]),
        (0.50, 12.0, ["zero_shot in acc", "emulator_finetune in acc"]),
        (0.58, 19.0, ["emulator_finetune in answer_nll"]),
        (0.58, 21.0, ["zero_shot in answer_nll", "emulator_finetune in answer_nll"]),
    ],
)
def test_broken_order_is_told(acc, nll, said):
    given = measured([0.50, 0.60, 0.40, 0.52, acc], [20.0, 10.0, 30.0, 18.0, nll])
    assert measurements.misordered(given) == [f"plug_in is not better than {what}" for what in said]
