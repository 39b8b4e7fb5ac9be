"""One row of the paper's table: a preset's runs as DVC experiments, and its five measurements a task.

`make table PRESET=opt-1.3b SEEDS=0,1,2 SET="alpha=0.5"`: python -m studies.table opt-1.3b SEEDS=0,1,2 alpha=0.5.
Of several seeds the table has means, and their standard errors in the place of one run's over its questions. An
experiment that is there already, of this commit, is read back.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import write_csv
from scaleot_core.params import changed, load_params
from scaleot_core.reporting import tables
from scaleot_core.reporting.measurements import by_row, over_seeds
from studies.experiments import experiment_name, parse_overrides, read_metrics, run

PRESETS = Path("presets.yaml")


def preset(name: str, arguments: list[str]) -> dict[str, Any]:
    """What a preset changes in params.yaml, with `key=value` settings on top; UserError for none such."""
    rows = {
        row: values
        for row, values in yaml.safe_load(PRESETS.read_text(encoding="utf-8")).items()
        if not row.startswith(".")
    }
    if name not in rows:
        raise UserError(f"{PRESETS}: no preset is named {name!r}; there are {', '.join(rows)}")
    changes = {**rows[name], **parse_overrides(arguments)}
    changed(load_params(), changes)  # a mistake is found before the run
    return changes


def seeds_of(arguments: list[str]) -> tuple[list[int], list[str]]:
    """Split `SEEDS=0,1,2` from the other arguments; no seed where it isn't there, UserError for others than these."""
    rest = [argument for argument in arguments if not argument.startswith("SEEDS=")]
    named = [argument.removeprefix("SEEDS=") for argument in arguments if argument not in rest]
    seeds = [seed for each in named for seed in each.split(",")]
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"SEEDS={','.join(named)}: seeds are whole numbers, each named once, as in SEEDS=0,1,2")
    return [int(seed) for seed in seeds], rest


def averaged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of several seeds: every float is its mean, with its error over them as `_stderr` beside it.

    All else, such as counts and names, is the first seed's.
    """
    if len(runs) == 1:
        return runs[0]
    found: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, dict):
            found[name] = averaged(values)
        elif any(isinstance(value, float) for value in values) and not name.endswith("_stderr"):
            mean = over_seeds(values)
            found |= {name: mean and mean[0], f"{name}_stderr": mean and mean[1]}
        else:
            found.setdefault(name, first)
    return found


def rows_of(metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Spread metrics over the lines of the CSV file: the five measurements, then gap and recovery of each kind."""
    for task, measured in metrics["tasks"].items():
        rows = by_row(measured)
        for kind, own in measured["adapters"].items():
            rows |= {f"{name}, {kind}": own[name] for name in ("gap", "recovery")}
        for measurement, found in rows.items():
            for metric in measured["metrics"]:
                yield {
                    "task": task,
                    "measurement": measurement,
                    "metric": metric,
                    "value": found[metric],
                    "standard error": found.get(f"{metric}_stderr"),
                }


def main() -> None:
    if len(sys.argv) < 2:
        raise UserError(f"name a preset of {PRESETS}: python -m studies.table PRESET [SEEDS=0,1,2] [KEY=VALUE ...]")
    name, (seeds, arguments) = sys.argv[1], seeds_of(sys.argv[2:])
    changes, title = preset(name, arguments), experiment_name("table", name, *arguments)
    runs = {experiment_name(title, "seed", seed): {**changes, "seed": seed} for seed in seeds} or {title: changes}
    metrics = averaged([read_metrics(run(each, own)) for each, own in runs.items()])
    used = " ".join(map(str, seeds or [changes.get("seed", load_params().seed)]))
    rows = [{**row, "seeds": used} for row in rows_of(metrics)]
    write_csv(Path(f"docs/studies/{title}.csv"), rows)
    tables.show(metrics)


if __name__ == "__main__":
    run_command(main)
