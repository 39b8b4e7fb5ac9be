"""Gap and recovery from the five measurements, means over seeds, and whether their order is the promised one."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

SHARED: tuple[Literal["zero_shot", "full_finetune", "emulator_zero_shot"], ...]
SHARED = ("zero_shot", "full_finetune", "emulator_zero_shot")  # by all kinds of adapters
TUNED: tuple[Literal["emulator_finetune", "plug_in"], ...] = ("emulator_finetune", "plug_in")
MEASUREMENTS: tuple[str, ...] = (*SHARED, *TUNED)
Figures = Mapping[str, float]
"""One measurement on one task: every metric, its `_stderr`, and the number of `questions`."""
Five = Mapping[str, Any]
"""A task's figures with those of one kind of adapters beside the others."""


class Utility(TypedDict):
    """Gap and recovery, by metric."""

    gap: dict[str, float | None]
    recovery: dict[str, float | None]


class AdapterFigures(Utility):
    """What one kind of adapters came to on one task."""

    emulator_finetune: Figures
    plug_in: Figures
    lr: float


class Measured(TypedDict):
    """One task in metrics.json."""

    metrics: list[str]
    lower_is_better: list[str]
    zero_shot: Figures
    full_finetune: Figures
    emulator_zero_shot: Figures
    lr: float
    """Of full fine-tuning."""
    adapters: dict[str, AdapterFigures]
    """By kind."""


class Metrics(TypedDict):
    """metrics.json."""

    tasks: dict[str, Measured]
    splits: str
    emulator: dict[str, Any]
    """The package's hash, its sizes, and how many layers became what."""
    corpus_perplexity: dict[str, float]
    versions: dict[str, str]


def five(measured: Measured, kind: str) -> Five:
    """Put a kind of adapters' measurements beside those that all have."""
    return {**measured, **measured["adapters"][kind]}


def of_kind(metrics: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """See all of metrics.json as if there were but one kind of adapters."""
    return {**metrics, "tasks": {task: five(measured, kind) for task, measured in metrics["tasks"].items()}}


def by_row(measured: Measured) -> dict[str, Figures]:
    """Order a task's measurements for a table or a picture: those that all adapters share, then each kind's two."""
    rows: dict[str, Figures] = {name: measured[name] for name in SHARED}
    for kind, figures in measured["adapters"].items():
        rows |= {f"{name}, {kind}": figures[name] for name in TUNED}
    return rows


def _values(measured: Five, metric: str) -> dict[str, float]:
    """Give the five measurements in one metric, with the sign turned where lower is better, as in a perplexity."""
    sign = -1 if metric in measured["lower_is_better"] else 1
    return {name: sign * measured[name][metric] for name in MEASUREMENTS}


def utility(measured: Five) -> Utility:
    """Compute gap and recovery of one task (method, "The two parties"), in each of its `metrics`.

    Gap = plug_in − emulator_finetune; recovery = (plug_in − zero_shot) / (full_finetune − zero_shot), None where full
    fine-tuning gained nothing. More is better in both, whatever the metric.
    """
    utility: Utility = {"gap": {}, "recovery": {}}
    for metric in measured["metrics"]:
        value = _values(measured, metric)
        ceiling = value["full_finetune"] - value["zero_shot"]
        utility["gap"][metric] = value["plug_in"] - value["emulator_finetune"]
        utility["recovery"][metric] = (value["plug_in"] - value["zero_shot"]) / ceiling if ceiling > 0 else None
    return utility


def mean(values: Sequence[float | None]) -> float | None:
    """Average values; None where there is none or one is undefined, as a recovery may be."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined and len(defined) == len(values) else None


def over_seeds(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Give the mean over seeds and, of several, its standard error; None where a seed has no figure."""
    defined, middle = [value for value in values if value is not None], mean(values)
    if middle is None:
        return None
    return middle, statistics.stdev(defined) / len(defined) ** 0.5 if len(defined) > 1 else None


def judged_by(measured: Measured | Five) -> list[str]:
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
