"""`make compare`: means, errors, the best of each column; what is run, kept and run anew."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, refusal

from scaleot_core.reporting.measurements import MEASUREMENTS
from studies import compare, experiments
from studies.columns import by_kind, comparison_columns
from studies.means import ROW_NAMES, seed_means


def metrics_of(gap: float, recovery: float | None) -> dict[str, Any]:
    """metrics.json of a run, with the figures that matter."""
    gain, plugged = 0.0 if recovery is None else 1.0, recovery or 0.0
    gained = {name: 0.0 for name in MEASUREMENTS} | {"full_finetune": gain, "plug_in": plugged}
    figures: dict[str, Any] = {name: {"acc": 0.5 + g / 10, "answer_nll": 3.0 - g} for name, g in gained.items()}
    adapters = {name: figures.pop(name) for name in ("emulator_finetune", "plug_in")}
    adapters["gap"] = {"acc": gap, "answer_nll": gap}
    better = {**adapters, "gap": {"acc": 2 * gap, "answer_nll": gap}}
    task: dict[str, Any] = {**figures, "adapters": {"layers": adapters, "lora": better}}
    return {
        "tasks": {"a": task, "b": task},
        "emulator": {"share_of_model": 0.7},
        "corpus_perplexity": {"emulator": 90.0},
    }


def test_comparison_has_means_errors_and_the_best() -> None:
    runs = {
        "uniform": [metrics_of(0.1, 0.5), metrics_of(0.2, 0.7)],
        "scaleot": [metrics_of(0.3, 0.5), metrics_of(0.3, None)],
    }
    rows = {}
    for method, seeds in runs.items():
        figures = [by_kind(lambda kind: comparison_columns(m, kind), ROW_NAMES) for m in seeds]  # noqa: B023
        rows |= {name.format(method): seed_means(figures, kind) for kind, name in ROW_NAMES.items()}
    assert rows["uniform"]["gap acc"] == pytest.approx((0.15, 0.05)) and rows["scaleot"]["gap acc"] == (0.3, 0.0)
    assert rows["uniform, lora"]["gap acc"] == pytest.approx((0.3, 0.1)) and len(rows) == 4
    assert rows["scaleot"]["recovery acc"] is None  # full fine-tuning gained nothing with one seed
    assert compare.winner(rows, "gap acc") == "scaleot, lora" and compare.winner(rows, "recovery acc") == "uniform"
    assert compare.winner(rows, "plug-in nll") == "uniform" and compare.winner(rows, "share of bytes") is None


def test_recovery_is_that_of_the_means_over_tasks() -> None:
    """A task that has nothing to gain divides nothing."""
    metrics = metrics_of(0.1, 0.5)
    metrics["tasks"]["b"] = metrics_of(0.1, None)["tasks"]["b"]
    columns = comparison_columns(metrics, "lora")
    assert columns["recovery acc"] == pytest.approx(0.5) == columns["recovery nll"]


class MadeUp(experiments.Run):
    def read(self, name: str) -> Any:
        return metrics_of(0.1, None)


Compared = Callable[..., list[Mapping[str, Any]]]


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compared:
    """Compare made-up runs in a folder of its own, without DVC; return what each run changed."""
    for name in ("params.yaml", "dvc.yaml", "embedded.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("scaleot_core", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("before\n<!-- compare -->\nold\n<!-- end of compare -->\nafter\n")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, meanwhile: Callable[[], Any] = lambda: None) -> list[Mapping[str, Any]]:
        ran: list[Mapping[str, Any]] = []

        def run_all(runs: Mapping[str, Any], label: str, targets: Any, ended: Callable[..., None]) -> None:
            for name, changes in runs.items():
                ran.append(changes)
                meanwhile()
                ended(name, MadeUp("commit"))

        monkeypatch.setattr(experiments, "run_all", run_all)
        monkeypatch.setattr("sys.argv", ["compare.py", *arguments])
        compare.main()
        return ran

    return call


def test_all_methods_run_with_all_seeds_and_the_table_is_written(compared: Compared) -> None:
    ran, log = compared("data.eval_questions=20"), Path("docs/results.md").read_text()
    assert log.startswith("before\n<!-- compare -->\n| means of piqa") and "old" not in log
    assert log.endswith("<!-- end of compare -->\nafter\n") and "data.eval_questions=20 |" in log
    lines = [line.strip("| ").split(" | ") for line in log.splitlines() if line.startswith("|")]
    table = {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
    assert len(table) == 14 and table["uniform"]["gap acc"] == "0.100 ± 0.000"
    assert table["uniform, lora"]["gap acc"] == "**0.200 ± 0.000**"
    methods = [*((m, 0.0) for m in ("uniform", "distilled", "crash", "gradot", "scaleot"))]
    expected = {(*method, seed) for method in [*methods, ("scaleot", 0.51), ("scaleot", 0.7)] for seed in (0, 1, 2)}
    assert {(changes["method"], changes["channels.ratio"], changes["seed"]) for changes in ran} == expected
    assert all(changes["data.eval_questions"] == 20 for changes in ran)
    Path("docs/results.md").write_text("no marks")
    assert "marks" in refusal(compare.replace_between_marks, compare.LOG, "compare", "x")


def test_rows_are_kept_until_code_changes_beside_those_of_other_settings(compared: Compared) -> None:
    runs = Path("docs/studies/compare-runs.csv")
    compared("data.eval_questions=20")
    text = runs.read_text()
    runs.write_text("".join(text.splitlines(keepends=True)[:-2]))  # stopped before the last two runs
    assert [changes["seed"] for changes in compared("data.eval_questions=20")] == [2, 2] and runs.read_text() == text
    assert len(compared("data.eval_questions=30")) == 21
    assert not compared("data.eval_questions=20") and not compared("data.eval_questions=30")
    with Path("stages/compress.py").open("a") as stream:
        stream.write("# another\n")
    assert len(compared("data.eval_questions=20")) == 21


def test_code_that_is_changed_while_a_study_runs_is_told(compared: Compared) -> None:
    """What was measured may be of either code."""
    with pytest.raises(Exception, match=r"compare-runs\.csv: code or data were changed while compare-uniform-seed-0"):
        compared(meanwhile=lambda: Path("stages/compress.py").write_text(""))
    assert not Path("docs/studies/compare-runs.csv").exists()
