"""`make sweep`: the grid of the dial, its columns and its picture."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from studies import sweep


def metrics_of(alpha: float, **undefined: None) -> dict[str, Any]:
    figures = {name: {"acc": 0.5 - alpha / 10, "answer_nll": 0.5} for name in ("gap", "recovery")}
    figures["recovery"] |= undefined
    measured = {f"{metric}{end}": 0.1 for metric in ("acc", "answer_nll") for end in ("", "_stderr")}
    task = {"adapters": {"layers": {**figures, "plug_in": measured, "emulator_finetune": measured}}}
    other = {"emulator": {"share_of_model": 0.7}, "corpus_perplexity": {"emulator": 50.0}}
    return {"tasks": {"a": task, "b": task}, **other}


def test_settings_with_alpha_one_are_one_experiment() -> None:
    grid = [sweep.setting(alpha, beta) for alpha, beta in itertools.product(sweep.ALPHAS, sweep.BETAS)]
    assert len({sweep.name_of(changes) for changes in grid}) == len(grid) - len(sweep.BETAS) + 1


def test_sweep_has_means_over_tasks_and_is_drawn(tmp_path: Path) -> None:
    columns = sweep.sweep_columns(metrics_of(0.0))
    assert columns["gap acc"] == pytest.approx(0.5) and columns["gap acc ±"] == pytest.approx((4 * 0.01) ** 0.5 / 2)
    undefined = sweep.sweep_columns(metrics_of(0.5, acc=None))  # full fine-tuning gained nothing
    assert math.isnan(undefined["recovery acc"]) and undefined["gap acc"] == pytest.approx(0.45)
    sweep.draw(
        tmp_path / "dial.png", [{"alpha": 0.0, "beta": 0.5, **columns}, {"alpha": 0.5, "beta": 0.5, **undefined}]
    )
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")
