"""`make attack-study`: its settings, all of them allowed."""

import sys

import pytest
import yaml
from helpers import ROOT, refusal

from scaleot_core.params import changed, load_params
from studies import attacks


def test_attacks_are_over_the_dial_over_channels_and_on_the_variants() -> None:
    study = {"alphas": [0.5, 1.0], "betas": [0.0, 0.8], "channels": [0.75], "variants": {"ends": {"alpha": 0.25}}}
    assert attacks.dials(study) == {
        "alpha 0.5 beta 0.0": ("β = 0, over α", 0.5, {"alpha": 0.5, "beta": 0.0}),
        "alpha 1.0 beta 0.0": ("β = 0, over α", 1.0, {"alpha": 1.0, "beta": 0.0}),  # and no layer is left for β
        "alpha 0.5 beta 0.8": ("β = 0.8, over α", 0.5, {"alpha": 0.5, "beta": 0.8}),
        "channels 0.75": (
            "channels alone, over their share cut",
            0.75,
            {"alpha": 0.0, "beta": 0.0, "channels.ratio": 0.75},
        ),
        "ends": ("ends", "", {"alpha": 0.25}),
    }


@pytest.mark.parametrize("name", ["attacks", "private"])
def test_every_setting_is_allowed(name: str) -> None:
    study = yaml.safe_load((ROOT / f"studies/{name}.yaml").read_text())
    for dial in attacks.dials(study).values():
        changed(load_params(ROOT / "params.yaml"), {**study["changes"], **dial.changes})


def test_study_of_attacks_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["attacks.py", "other"])
    assert "`attacks` and `private` are there" in refusal(attacks.main)
