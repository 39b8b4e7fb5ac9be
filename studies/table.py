"""One row of the paper's table: a preset's runs as DVC experiments, and its five measurements a task.

`make table PRESET=opt-1.3b SEEDS=0,1,2 SET="alpha=0.5"`: python -m studies.table opt-1.3b SEEDS=0,1,2 alpha=0.5.
Of several seeds the table has means, and their standard errors in the place of one run's over its questions. Finished
experiments of this commit are not run again.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import write_csv
from scaleot_core.params import load_params
from scaleot_core.reporting import tables
from scaleot_core.reporting.measurements import by_row, over_seeds
from studies.experiments import experiment_name, run_all
from studies.preset import load_preset


def split_seeds(arguments: list[str]) -> tuple[list[int], list[str]]:
    """Split `SEEDS=0,1,2` from the other arguments; no seed where it isn't there, UserError for others than these."""
    others = [argument for argument in arguments if not argument.startswith("SEEDS=")]
    lists = [argument.removeprefix("SEEDS=") for argument in arguments if argument not in others]
    seeds = [seed for seed_list in lists for seed in seed_list.split(",")]
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"SEEDS={','.join(lists)}: seeds are whole numbers, each named once, as in SEEDS=0,1,2")
    return [int(seed) for seed in seeds], others


def averaged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of several seeds: every float is its mean, with its error over them as `_stderr` beside it.

    All else, such as counts and names, is the first seed's.
    """
    if len(runs) == 1:
        return runs[0]
    averages: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, dict):
            averages[name] = averaged(values)
        elif any(isinstance(value, float) for value in values) and not name.endswith("_stderr"):
            averages[name], averages[f"{name}_stderr"] = over_seeds(values) or (None, None)
        else:
            averages.setdefault(name, first)
    return averages


def table_rows(metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Spread metrics over the rows of the CSV file: the five measurements, then gap and recovery of each kind."""
    for task, measured in metrics["tasks"].items():
        measurements = by_row(measured)
        for kind, adapters in measured["adapters"].items():
            measurements |= {f"{name}, {kind}": adapters[name] for name in ("gap", "recovery")}
        for measurement, figures in measurements.items():
            for metric in measured["metrics"]:
                value, error = figures[metric], figures.get(f"{metric}_stderr")
                yield {
                    "task": task,
                    "measurement": measurement,
                    "metric": metric,
                    "value": value,
                    "standard error": error,
                }


def main() -> None:
    if len(sys.argv) < 2:
        raise UserError("name a preset of presets.yaml: python -m studies.table PRESET [SEEDS=0,1,2] [KEY=VALUE ...]")
    preset, (seeds, overrides) = sys.argv[1], split_seeds(sys.argv[2:])
    changes, title = load_preset(preset, overrides), experiment_name("table", preset, *overrides)
    experiments = {experiment_name(title, "seed", seed): {**changes, "seed": seed} for seed in seeds}
    runs = run_all(experiments or {title: changes}, "table")
    metrics = averaged([run.metrics for run in runs.values()])
    shown_seeds = " ".join(map(str, seeds or [changes.get("seed", load_params().seed)]))
    write_csv(Path(f"docs/studies/{title}.csv"), [{**row, "seeds": shown_seeds} for row in table_rows(metrics)])
    tables.show(metrics)


if __name__ == "__main__":
    run_command(main)
