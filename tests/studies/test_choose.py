"""`make choose`: which runs are made, and which setting is recommended."""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, refusal

from scaleot_core.common.files import read_csv
from scaleot_core.params import Params, changed
from studies import choose, experiments
from studies.frontier import Needs

STUDY = yaml.safe_load((ROOT / "studies/choose.yaml").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what has to hold"),
        (["alpha=0.5"], "say what has to hold"),
        (["RECOVERY=high"], "RECOVERY = 'high': a number above 0"),
        (["BYTES=1.5"], "BYTES = 1.5: a number above 0, at most 1, is needed"),
        (["LACKS=-1"], "LACKS = -1"),
        (["RECOVERY=true"], "RECOVERY = True"),
        (["RECOVERY"], "a setting is KEY=VALUE"),
    ],
    ids=str,
)
def test_wrong_needs_are_one_line(arguments: list[str], message: str) -> None:
    assert message in refusal(choose.parse, arguments)


def test_needs_and_changes_are_told_apart() -> None:
    needs = Needs(recovery=0.9, bytes=0.6)
    assert choose.parse(["RECOVERY=0.9", "BYTES=0.6", "tasks=[sciq]"]) == (needs, {"tasks": ["sciq"]})


def test_every_setting_that_is_searched_is_a_valid_one() -> None:
    for line in STUDY["lines"].values():
        for value in line["values"]:
            changed(Params(), {**STUDY["changes"], **line["changes"], line["over"]: value})


class MadeUp(experiments.Run):
    """A run whose recovery falls, and whose attacker lacks more, the more is cut; full fine-tuning gains 2 nats."""

    def __init__(self, changes: Mapping[str, Any], first: float, error: float) -> None:
        cut = (changes["channels.ratio"] or 0.6) + changes.get("alpha", 0.0)
        recovery = 1 - cut / 2 + first * (changes["seed"] == 0)
        plug_in = {"answer_nll": 10 - 2 * recovery, "answer_nll_stderr": error}
        adapters = {"recovery": {"answer_nll": recovery}, "gap": {"answer_nll": 0.5}, "plug_in": plug_in}
        task = {
            "metrics": ["acc", "answer_nll"],
            "zero_shot": {"answer_nll": 10.0},
            "full_finetune": {"answer_nll": 8.0},
            "adapters": {"layers": adapters, "lora": adapters},
        }
        perplexity = {"perplexity": 20.0 * math.exp(cut)}
        files = {
            "metrics.json": {
                "tasks": {"piqa": task},
                "corpus_perplexity": {"model": 20.0},
                "emulator": {"share_of_model": recovery * 0.8},
            },
            "attack.json": {"restoration": {"package": perplexity}, "weights": {"exact": 0.5}},
        }
        object.__setattr__(self, "files", files)

    def read(self, name: str) -> Any:
        return self.files[name]  # type: ignore[attr-defined]


Study = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Study:
    """Run the study on made-up runs; return what each changed. The first seed shows `first` too much recovery."""
    monkeypatch.setattr(choose, "OUT", tmp_path)
    monkeypatch.chdir(ROOT)

    def call(*arguments: str, error: float = 0.1, first: float = 0.0) -> list[dict[str, Any]]:
        ran: list[dict[str, Any]] = []

        def run_all(runs: Mapping[str, Any], label: str, targets: Any, ended: Callable[..., None]) -> None:
            for name, changes in runs.items():
                ran.append(changes)
                ended(name, MadeUp(changes, first, error))

        monkeypatch.setattr(experiments, "run_all", run_all)
        monkeypatch.setattr(sys, "argv", ["choose", *arguments])
        choose.main()
        return ran

    return call


@pytest.mark.parametrize("change", ["alpha=0.5", "adapters=[lora]", "seed=3"])
def test_change_that_the_search_makes_itself_is_refused(study: Study, change: str) -> None:
    assert "is what is searched" in refusal(lambda: study("RECOVERY=0.9", change))


@pytest.mark.slow
def test_best_setting_is_recommended_with_all_seeds_and_nothing_is_run_twice(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = study("RECOVERY=0.75")
    printed = capsys.readouterr().err
    rows = read_csv(tmp_path / "choose.csv")
    best = max((row for row in rows if row["recovery"] >= 0.75), key=lambda row: row["remaining gap"])
    assert best["seeds"] == 3 and best["remaining gap ±"] == 0 and f"recommended: {best['changes']}" in printed
    planned = sum(len(line["values"]) for line in STUDY["lines"].values())
    assert len([run for run in runs if run["seed"] == 0]) == planned
    assert {row["seeds"] for row in rows} == {1, 3} and {run["seed"] for run in runs} == {0, 1, 2}
    assert (tmp_path / "choose.png").stat().st_size > 10_000
    assert study("RECOVERY=0.75") == []  # all figures are in choose-runs.csv
    study("RECOVERY=0.75", "tasks=[sciq]")
    assert "-S 'tasks=['sciq']'" in capsys.readouterr().err.replace('"', "'")


@pytest.mark.slow
def test_recommended_setting_meets_the_need_with_all_seeds_whatever_the_first_one_shows(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study("RECOVERY=0.65", first=0.15)  # which the mean of three seeds has a third of
    printed, rows = capsys.readouterr().err, read_csv(tmp_path / "choose.csv")
    (recommended,) = {row["label"]: row for row in rows if f"recommended: {row['changes']}\n" in printed}.values()
    assert recommended["seeds"] == 3 and recommended["recovery"] >= 0.65
    better = [r for r in rows if r["recovery"] >= 0.65 and r["remaining gap"] > recommended["remaining gap"]]
    assert not better and any(row["seeds"] == 3 and row["recovery"] < 0.65 for row in rows)


@pytest.mark.slow
def test_what_nothing_reaches_ends_with_the_nearest_and_by_how_much(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    study("RECOVERY=1.5")
    assert "no setting here meets RECOVERY: the nearest misses it by 0.65" in capsys.readouterr().err


def test_task_that_can_tell_no_settings_apart_is_told_after_the_first_run(study: Study) -> None:
    assert "raise data.eval_questions" in refusal(lambda: study("RECOVERY=0.8", error=0.6))


def test_task_on_which_full_fine_tuning_gains_nothing_is_told() -> None:
    assert "gains nothing" in refusal(choose.check_task, {"recovery": None, "recovery error": (0.1, None)})
