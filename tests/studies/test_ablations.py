"""`make ablations`: what moves is confirmed, and every ablation changes a parameter to an allowed value."""

from typing import Any

import pytest
import yaml
from helpers import ROOT

from scaleot_core.params import Params, changed
from studies import ablations


def measured(gap: float, recovery: float | None, *, gained: float = 0.2) -> dict[str, Any]:
    """One task in metrics.json, each accuracy with a standard error of 0.03."""
    errors = {name: {"acc_stderr": 0.03} for name in ("plug_in", "emulator_finetune")}
    adapters = {"layers": {"gap": {"acc": gap}, "recovery": {"acc": recovery}, **errors}}
    return {"zero_shot": {"acc": 0.3}, "full_finetune": {"acc": 0.3 + gained}, "adapters": adapters}


@pytest.mark.parametrize(
    ("gap", "recovery", "moved"),
    [
        (0.05, 0.8, False),
        (0.09, 0.8, False),  # 0.04 of 0.042
        (0.10, 0.8, True),
        (0.00, 0.8, True),
        (0.05, 0.66, False),  # 0.14 of 0.15
        (0.05, 0.60, True),
    ],
)
def test_what_moves_by_more_than_a_standard_error_is_confirmed(gap: float, recovery: float, moved: bool) -> None:
    assert ablations.moves(measured(gap, recovery), measured(0.05, 0.8)) is moved


def test_recovery_counts_only_where_there_is_something_to_recover() -> None:
    assert not ablations.moves(measured(0.05, None, gained=0), measured(0.05, None, gained=0))


def test_summary_has_an_error_only_of_several() -> None:
    assert ablations.summary([0.25]) == ("0.250", "") and ablations.summary([0.1, None]) == ("", "")
    assert ablations.summary([0.1, 0.3]) == ("0.200", "0.100")


def test_every_ablation_changes_a_parameter_to_an_allowed_value(params: Params) -> None:
    entries = yaml.safe_load((ROOT / "studies/ablations.yaml").read_text())
    assert entries.pop("default") == {}
    for changes in entries.values():
        assert changed(params, changes) != params
