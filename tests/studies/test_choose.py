"""`make choose`: what has to hold, which setting is recommended, and what is run for it."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, refusal, tiny_model

from scaleot_core.common.files import read_csv
from scaleot_core.compression.plan import plan_for
from scaleot_core.params import Params, changed
from studies import choose
from studies.frontier import Needs, between, frontier, neighbours

SETTINGS = yaml.safe_load((ROOT / "studies/choose.yaml").read_text())


def row(recovery: float | None, gap: float, share: float = 0.7) -> dict[str, Any]:
    return {"recovery": recovery, "remaining gap": gap, "bytes": share}


ROWS = [row(0.95, 0.2, 0.8), row(0.9, 0.5, 0.7), row(0.85, 0.4, 0.7), row(0.7, 1.0, 0.5), row(None, 1.5, 0.4)]


@pytest.mark.parametrize(
    ("needs", "index", "misses"),
    [
        (Needs(recovery=0.8), 1, {}),
        (Needs(recovery=0.95), 0, {}),
        (Needs(lacks=0.45), 1, {}),
        (Needs(lacks=1.2), 4, {}),
        (Needs(bytes=0.6), 3, {}),
        (Needs(recovery=0.6, bytes=0.75), 3, {}),
        (Needs(recovery=0.99), 0, {"recovery": 0.04}),
        (Needs(bytes=0.3), 4, {"bytes": 0.1}),
        (Needs(recovery=0.9, lacks=0.6), 1, {"lacks": 0.1}),
    ],
    ids=str,
)
def test_best_setting_holds_what_is_asked_and_gives_most_of_the_rest(
    needs: Needs, index: int, misses: dict[str, float]
) -> None:
    best = needs.best(ROWS)
    assert ROWS.index(best) == index
    assert needs.misses(best) == pytest.approx(misses)


def test_frontier_leaves_out_what_another_setting_beats() -> None:
    assert frontier(ROWS) == [ROWS[i] for i in (4, 3, 1, 0)]
    assert neighbours(ROWS, ROWS[1]) == [ROWS[3], ROWS[0]]
    assert neighbours(ROWS, ROWS[0]) == [ROWS[1], ROWS[3]] and neighbours(ROWS, ROWS[4]) == [ROWS[3], ROWS[1]]
    assert neighbours(ROWS[:2], ROWS[0]) == [ROWS[1]] and neighbours(ROWS[:1], ROWS[0]) == []


def test_what_is_between_a_setting_that_holds_and_one_that_does_not_is_tried() -> None:
    assert between([0.3, 0.45, 0.6], [True, True, False]) == [0.525]
    assert between([0.3, 0.45], [True, True]) == between([0.3], [True]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what has to hold"),
        (["alpha=0.5"], "say what has to hold"),
        (["RECOVERY=high"], "RECOVERY = 'high': a number above 0"),
        (["BYTES=1.5"], "BYTES = 1.5: a number above 0 is needed, at most 1"),
        (["LACKS=-1"], "LACKS = -1"),
        (["RECOVERY=true"], "RECOVERY = True"),
        (["RECOVERY"], "a setting is KEY=VALUE"),
    ],
    ids=str,
)
def test_wrong_needs_are_one_line(arguments: list[str], said: str) -> None:
    assert said in refusal(choose.parse, arguments)


@pytest.mark.parametrize("change", ["alpha=0.5", "adapters=[lora]", "seed=3"])
def test_change_that_the_search_makes_itself_is_refused(made: Callable[..., list[dict[str, Any]]], change: str) -> None:
    assert "is what is searched" in refusal(lambda: made("RECOVERY=0.9", change))


def test_needs_and_changes_are_told_apart() -> None:
    assert choose.parse(["RECOVERY=0.9", "BYTES=0.6", "tasks=[sciq]"]) == (
        Needs(recovery=0.9, bytes=0.6),
        {"tasks": ["sciq"]},
    )


def test_every_setting_that_is_searched_is_a_valid_one() -> None:
    for line in SETTINGS["lines"].values():
        for value in line["values"]:
            changed(Params(), {**SETTINGS["changes"], **line["changes"], line["over"]: value})


def test_scores_are_made_cheap_where_no_plan_hangs_on_them() -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    for line in SETTINGS["lines"].values():
        changes = {**SETTINGS["changes"], **line["changes"], line["over"]: line["values"][-1]}
        params, scores = changed(Params(), changes), [3.0, 1.0, 2.0, 0.0, 5.0, 0.5, 4.0, 1.5]
        plans = [plan_for(params, given, model) for given in (scores, scores[::-1])]
        cheap = choose.spared(changes)
        assert ("dlr.steps" in cheap) == (plans[0] == plans[1]), line
        assert changed(Params(), dict(cheap)) == params or "dlr.steps" in cheap
    even = {"alpha": 0.0, "adapter_layers": 0, "adapters": ["lora"]}
    assert choose.spared({**even, "dlr.steps": 9})["dlr.steps"] == 9
    for needed in ({"max_bytes_ratio": 0.5}, {"method": "crash"}):
        assert choose.spared({**even, **needed}) == {**even, **needed}


def measured(recovery: float, perplexity: float, error: float = 0.1) -> tuple[dict[str, Any], dict[str, Any]]:
    """What metrics.json and attack.json have of a run whose task gains 2 nats by full fine-tuning."""
    kind = {
        "recovery": {"answer_nll": recovery},
        "gap": {"answer_nll": 0.5},
        "plug_in": {"answer_nll": 10 - 2 * recovery, "answer_nll_stderr": error},
    }
    task = {
        "metrics": ["acc", "answer_nll"],
        "zero_shot": {"answer_nll": 10.0},
        "full_finetune": {"answer_nll": 8.0},
        "adapters": {"layers": kind, "lora": kind},
    }
    metrics = {
        "tasks": {"piqa": task},
        "corpus_perplexity": {"model": 20.0},
        "emulator": {"share_of_model": recovery * 0.8},
    }
    return metrics, {"restoration": {"package": {"perplexity": perplexity}}, "weights": {"exact": 0.5}}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the study on runs whose recovery falls, and whose attacker lacks more, the more is cut; return what ran.

    The first seed shows `first` too much of every recovery.
    """
    monkeypatch.setattr(choose, "OUT", tmp_path)
    monkeypatch.setattr(choose, "workers", lambda: 1)  # whatever the machine's, which the order of the runs hangs on
    monkeypatch.chdir(ROOT)
    ran: list[dict[str, Any]] = []

    def study(*arguments: str, error: float = 0.1, first: float = 0.0) -> list[dict[str, Any]]:
        def run_all(wanted: dict[str, Any], label: str, targets: Any) -> Iterator[tuple[str, dict[str, Any]]]:
            for name, changes in wanted.items():
                ran.append(changes)
                yield name, changes

        def read(run: dict[str, Any], name: str = "metrics.json") -> Any:
            cut = (run["channel_pruning.ratio"] or 0.6) + run["alpha"]
            shown = 1 - cut / 2 + first * (run["seed"] == 0)
            return measured(shown, 20 * math.exp(cut), error)[name == "attack.json"]

        ran.clear()
        monkeypatch.setattr(choose, "run_all", run_all)
        monkeypatch.setattr(choose, "read_metrics", read)
        monkeypatch.setattr(sys, "argv", ["choose", *arguments])
        choose.main()
        return list(ran)

    return study


@pytest.mark.slow
def test_study_recommends_a_setting_with_its_seeds_and_runs_nothing_twice(
    made: Callable[..., list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = made("RECOVERY=0.75")
    said = capsys.readouterr().err
    assert "recommended: " in said and "channel_pruning.ratio" in said and "dvc exp run" in said
    assert "dlr.steps" not in said and {"dlr.steps" in run for run in runs} == {True, False}
    assert {run["seed"] for run in runs} == {0, 1, 2}
    rows = read_csv(tmp_path / "choose.csv")
    best = max((r for r in rows if r["recovery"] >= 0.75), key=lambda r: r["remaining gap"])
    assert best["remaining gap ±"] == 0 and f"recommended: {best['changes']}" in said
    assert len([r for r in rows if r["remaining gap ±"] != ""]) == 3
    assert (tmp_path / "choose.png").stat().st_size > 10_000
    assert made("RECOVERY=0.75") == []  # all figures are in choose-runs.csv
    made("RECOVERY=0.75", "tasks=[sciq]")
    assert "-S 'tasks=['sciq']'" in capsys.readouterr().err.replace('"', "'")


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_however_many_run_at_once_the_search_tries_the_same_settings_each_once(
    made: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(choose, "workers", lambda: at_once)
    made("RECOVERY=0.5")
    rows = [(row["line"], row["label"]) for row in read_csv(tmp_path / "choose.csv")]
    lines = SETTINGS["lines"].items()
    kinds = [(f"{name}, {kind}", line["values"]) for name, line in lines for kind in line["changes"]["adapters"]]
    planned = {(name, value) for name, values in kinds for value in values}
    assert len(rows) == len({*rows}) and planned < {*rows}
    assert {*rows} - planned == {(f"the dial, β = 0.8, {kind}", 0.375) for kind in ("layers", "lora")}


@pytest.mark.slow
def test_what_the_first_seed_shows_too_high_is_confirmed_once_and_then_known(
    made: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Of four settings to which the first seed gives 0.65 though they have less, one is tried with all seeds."""
    runs = made("RECOVERY=0.65", first=0.15)
    rows = read_csv(tmp_path / "choose.csv")
    promised = [r for r in rows if r["remaining gap ±"] == "" and 0.65 <= r["recovery"] < 0.65 + 0.15]
    kept = [r for r in rows if r["remaining gap ±"] != ""]
    assert len(promised) >= 3 and any(r["recovery"] >= 0.65 for r in kept)
    assert len([run for run in runs if run["seed"] > 0]) == 2 * len(kept)
    missed = [r for r in kept if r["recovery"] < 0.65]
    assert 1 <= len(missed) <= 2  # the first that was tried, and the neighbour with less recovery


def test_neighbour_that_turns_out_better_with_all_seeds_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    search = choose.Search(SETTINGS, {})
    search.rows = [row(0.95, 0.5), row(0.88, 0.7), row(0.5, 2.0)]
    seeds = {0.5: 0.93, 0.7: 0.91, 2.0: 0.4}  # of the second less is expected: the first moved by -0.02

    def confirm(rows: list[dict[str, Any]]) -> None:
        for each in search.unconfirmed(rows):
            each |= {"first": dict(each), "recovery": seeds[each["remaining gap"]]}

    monkeypatch.setattr(search, "confirm", confirm)
    assert [each["remaining gap"] for each in search.recommended(Needs(recovery=0.9))] == [0.7, 2.0, 0.5]


def test_what_nothing_reaches_ends_with_the_nearest_and_by_how_much(
    made: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    made("RECOVERY=1.5")
    assert "no setting here meets RECOVERY: the nearest misses it by 0.65" in capsys.readouterr().err


def test_task_that_can_tell_no_settings_apart_is_told_after_the_first_run(
    made: Callable[..., list[dict[str, Any]]],
) -> None:
    assert "raise data.eval_questions" in refusal(lambda: made("RECOVERY=0.8", error=0.6))


def test_task_on_which_full_fine_tuning_gains_nothing_is_told() -> None:
    assert "gains nothing" in refusal(choose.check_task, {"recovery": None, "recovery error": 0.1})
