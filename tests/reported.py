"""Figures as stages write them, for tables, pictures and summaries."""

from typing import Any

from scaleot_core.reporting import measurements

HISTORIES = {
    "local fits": [{"step": 0, "loss": 1.5, "more": 7}, {"step": 1, "loss": 1.25}],
    "DLR": [{"step": 0, "loss": 3.0}],
}
LAYERS = {"prior": [0.5, -1.0, 0.25], "scores": [1.5, -2.0, 1.25], "kinds": ["adapter", "harmonizer", "compressed"]}


def measured(acc: list[float], nll: list[float]) -> dict[str, Any]:
    """Give the five measurements of a task of questions, in the order of `measurements.MEASUREMENTS`."""
    rows = zip(measurements.MEASUREMENTS, acc, nll, strict=True)
    five = {n: {"acc": a, "acc_stderr": 0.01, "answer_nll": b, "answer_nll_stderr": 0.1} for n, a, b in rows}
    return five | {"metrics": ["acc", "answer_nll"], "lower_is_better": ["answer_nll"]}


def perplexity(values: list[float]) -> dict[str, Any]:
    """Give the five measurements of a task of texts, in the order of `measurements.MEASUREMENTS`."""
    five: dict[str, Any] = {
        n: {"perplexity": v, "perplexity_stderr": 0.5} for n, v in zip(measurements.MEASUREMENTS, values, strict=True)
    }
    return five | {"metrics": ["perplexity"], "lower_is_better": ["perplexity"]}


def task_of(**kinds: dict[str, Any]) -> dict[str, Any]:
    """Give a task as metrics.json has it, from the five measurements of every kind of adapters."""
    shared = next(iter(kinds.values()))
    adapters = {
        kind: {name: five[name] for name in ("emulator_finetune", "plug_in")} | measurements.utility(five)
        for kind, five in kinds.items()
    }
    return {key: shared[key] for key in shared.keys() - adapters[next(iter(kinds))].keys()} | {"adapters": adapters}


# zero_shot, full_finetune, emulator_zero_shot, emulator_finetune, plug_in
GOOD = measured([0.50, 0.60, 0.40, 0.52, 0.58], [20.0, 10.0, 30.0, 18.0, 12.0])
