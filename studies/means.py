"""Means over seeds of the figures of runs, and how tables and CSV files have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from scaleot_core.reporting.measurements import over_seeds
from studies.experiments import Figures

Mean = tuple[float, float | None]
"""A mean over seeds and its standard error; of one seed there is no error."""
Means = Mapping[str, Mean | None]
"""By the column's name; None where a seed has no figure."""

ROW_NAMES = {"layers": "{}", "lora": "{}, lora"}  # of a setting with a kind of adapters


def seed_means(runs: Sequence[Figures], kind: str) -> Means:
    """Average the columns of one kind of adapters over runs that differ in their seed."""
    columns = [name.removesuffix(f", {kind}") for name in runs[0] if name.endswith(f", {kind}")]
    return {column: over_seeds([run[f"{column}, {kind}"] for run in runs]) for column in columns}


def spread(means: Means) -> dict[str, Any]:
    """Write means for a CSV file: a column for each, and one, with ±, for its standard error."""
    row: dict[str, Any] = {}
    for column, mean in means.items():
        row[column], row[f"{column} ±"] = mean or (None, None)
    return row


def mean_text(mean: Mean | None) -> str:
    """Write a mean and its standard error for a person."""
    if mean is None:
        return "–"
    digits = 0 if mean[0] >= 100 else 3 if mean[0] < 3 else 2
    return f"{mean[0]:,.{digits}f}" + ("" if mean[1] is None else f" ± {mean[1]:,.{digits}f}")
