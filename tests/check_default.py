"""What the default run must show, read from its metrics.json: `make check-default` makes the run first."""

import json
from typing import Any

import pytest
from helpers import ROOT
from rich.console import Console

from scaleot_core.params import load_params
from scaleot_core.reporting.measurements import by_row, five, misordered
from scaleot_core.reporting.tables import measurement_table

LEAST_QUESTIONS = 400
PARAMS = load_params(ROOT / "params.yaml")
TASKS = PARAMS.tasks


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    file = ROOT / "metrics.json"
    if not file.is_file():
        pytest.fail(f"{file.name} is missing: `make repro` writes it")
    return json.loads(file.read_text())


def shown(metrics: dict[str, Any]) -> str:
    """The table of all measurements and what the emulator came to, for a failing check to print."""
    console = Console(width=40 + 50 * len(TASKS))
    with console.capture() as capture:
        console.print(measurement_table(metrics["tasks"]))
        console.print({name: metrics[name] for name in ("emulator", "corpus_perplexity")})
    return f"\n{capture.get()}"


def test_every_default_task_is_measured(metrics: dict[str, Any]) -> None:
    assert sorted(metrics["tasks"]) == sorted(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_enough_questions(metrics: dict[str, Any], task: str) -> None:
    counts = {figures["questions"] for figures in by_row(metrics["tasks"][task]).values()}
    assert min(counts) >= LEAST_QUESTIONS and len(counts) == 1, shown(metrics)


@pytest.mark.parametrize("kind", PARAMS.adapters)
@pytest.mark.parametrize("task", TASKS)
def test_plug_in_beats_the_start_and_the_tuned_emulator(metrics: dict[str, Any], task: str, kind: str) -> None:
    assert not misordered(five(metrics["tasks"][task], kind)), shown(metrics)


def test_emulator_is_smaller_and_worse_than_the_model(metrics: dict[str, Any]) -> None:
    assert 0 < metrics["emulator"]["bytes"] < metrics["emulator"]["model_bytes"], shown(metrics)
    perplexity = metrics["corpus_perplexity"]
    assert perplexity["emulator"] > perplexity["model"] > 1, shown(metrics)
