"""Gap and recovery from the five measurements, means over seeds, and whether their order is the promised one."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MEASUREMENTS = ("zero_shot", "full_finetune", "emulator_zero_shot", "emulator_finetune", "plug_in")
Measured = Mapping[str, Any]
"""One task in metrics.json: its measurements, those of every kind of adapters below `adapters`, and what their figures
are: `metrics` and `lower_is_better`."""
Five = Mapping[str, Any]
"""The same with one kind's measurements beside the others."""


def five(measured: Measured, kind: str) -> Five:
    """Put a kind of adapters' measurements beside those that all have."""
    return {**measured, **measured["adapters"][kind]}


def of_kind(metrics: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """See all of metrics.json as if there were but one kind of adapters."""
    return {**metrics, "tasks": {task: five(measured, kind) for task, measured in metrics["tasks"].items()}}


def by_row(measured: Measured) -> dict[str, Mapping[str, Any]]:
    """Order a task's measurements for a table or a picture: those that all adapters share, then each kind's two."""
    rows = {name: measured[name] for name in MEASUREMENTS if name in measured}
    for kind, own in measured["adapters"].items():
        rows |= {f"{name}, {kind}": own[name] for name in MEASUREMENTS if name in own}
    return rows


def _values(measured: Five, metric: str) -> dict[str, float]:
    """Give the five measurements in one metric, with the sign turned where lower is better, as in a perplexity."""
    sign = -1 if metric in measured["lower_is_better"] else 1
    return {name: sign * measured[name][metric] for name in MEASUREMENTS}


def utility(measured: Five) -> dict[str, dict[str, float | None]]:
    """Compute gap and recovery of one task (method, "The two parties"), in each of its `metrics`.

    Gap = plug_in − emulator_finetune; recovery = (plug_in − zero_shot) / (full_finetune − zero_shot), None where full
    fine-tuning gained nothing. More is better in both, whatever the metric.
    """
    found: dict[str, dict[str, float | None]] = {"gap": {}, "recovery": {}}
    for metric in measured["metrics"]:
        value = _values(measured, metric)
        ceiling = value["full_finetune"] - value["zero_shot"]
        found["gap"][metric] = value["plug_in"] - value["emulator_finetune"]
        found["recovery"][metric] = (value["plug_in"] - value["zero_shot"]) / ceiling if ceiling > 0 else None
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Average values; None where there is none or one is undefined, as a recovery may be."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def over_seeds(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Give the mean over seeds and, of several, its standard error; None where a seed has no figure."""
    known, middle = [value for value in values if value is not None], mean(values)
    if middle is None:
        return None
    return middle, statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def judged_by(measured: Measured) -> list[str]:
    """Name the metrics that a task is judged by: its first, and its last, which is the least noisy."""
    return list(dict.fromkeys([measured["metrics"][0], measured["metrics"][-1]]))


def misordered(measured: Five) -> list[str]:
    """List what is not as the method promises, in the metrics that count; an empty list means that all is."""
    wrong = []
    for metric in judged_by(measured):
        value = _values(measured, metric)
        for lower in ("zero_shot", "emulator_finetune"):
            if value["plug_in"] <= value[lower]:
                wrong.append(f"plug_in is not better than {lower} in {metric}")
    return wrong
