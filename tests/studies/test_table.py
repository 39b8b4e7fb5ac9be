"""`make table`: the five measurements of every task, of one run or as means over seeds."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, refusal
from reported import task_of

from scaleot_core.common.files import read_csv
from scaleot_core.reporting.measurements import MEASUREMENTS
from studies import experiments, table


class MadeUp(experiments.Run):
    """The figures of seed s are those of seed 0 and s more; `commit` is the seed."""

    def read(self, name: str) -> Any:
        seed = int(self.commit)
        figures = {"acc": 0.5 + seed, "acc_stderr": 0.01, "answer_nll": 3.0 + seed, "answer_nll_stderr": 0.1}
        five = {name: figures for name in MEASUREMENTS}
        other = {"metrics": ["acc", "answer_nll"], "lower_is_better": ["answer_nll"], "lr": {}}
        tasks = {task: task_of(layers=five | other) for task in ("piqa", "sciq")}
        return {"tasks": tasks, "emulator": {"share_of_model": 0.7}} | {
            "corpus_perplexity": {"model": 20.0, "emulator": 90.0}
        }


Tabulate = Callable[..., tuple[Mapping[str, Any], dict[tuple[str, ...], tuple[Any, Any]]]]


@pytest.fixture
def tabulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tabulate:
    """Make the table of made-up runs; return what each run changed, and its figures with their errors."""
    for name in ("presets.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> Any:
        ran: dict[str, Any] = {}

        def run_all(runs: Mapping[str, Any], label: str) -> dict[str, MadeUp]:
            ran.update(runs)
            return {name: MadeUp(str(changes.get("seed", 0))) for name, changes in runs.items()}

        monkeypatch.setattr(table, "run_all", run_all)
        monkeypatch.setattr("sys.argv", ["table.py", *arguments])
        table.main()
        rows = read_csv(Path("docs", "studies", f"{name}.csv"))
        figures = {
            (row["task"], row["measurement"], row["metric"]): (row["value"], row["standard error"]) for row in rows
        }
        return ran, figures

    return call


def test_table_has_the_five_measurements_of_every_task(tabulate: Tabulate) -> None:
    ran, figures = tabulate("table-nine-tasks-alpha-0.5", "nine-tasks", "alpha=0.5")
    assert list(ran) == ["table-nine-tasks-alpha-0.5"] and ran["table-nine-tasks-alpha-0.5"]["alpha"] == 0.5
    assert len(figures) == 2 * (5 + 2) * 2  # tasks, measurements with gap and recovery, metrics
    assert figures["piqa", "zero_shot", "acc"] == (0.5, 0.01)


def test_table_of_several_seeds_has_means_and_their_standard_errors(tabulate: Tabulate) -> None:
    ran, figures = tabulate("table-recommended", "recommended", "SEEDS=0,2")
    assert {name: changes["seed"] for name, changes in ran.items()} == {
        "table-recommended-seed-0": 0,
        "table-recommended-seed-2": 2,
    }
    assert figures["sciq", "zero_shot", "answer_nll"] == (4.0, 1.0)
    assert figures["sciq", "recovery, layers", "acc"] == ("", "")  # undefined in one of them
    assert "SEEDS=0,two: seeds are whole numbers" in refusal(table.split_seeds, ["SEEDS=0,two"])
