"""Ablations: the pipeline with one thing changed at a time, as DVC experiments.

The first seed screens; an ablation that moves gap or recovery of a task by more than a standard error gets the other
seeds. Finished experiments of this commit are not run again. `make ablations` runs it.
"""

import statistics
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_csv
from scaleot_core.common.progress import console
from scaleot_core.params import load_params
from scaleot_core.reporting.measurements import Measured, five, over_seeds
from studies.experiments import experiment_name, run_all

SEEDS = (0, 1, 2)
OUT = Path("docs/studies/ablations.csv")
FIGURES = {
    "gap": ("gap", "acc"),
    "recovery": ("recovery", "acc"),
    "gap nll": ("gap", "answer_nll"),
    "recovery nll": ("recovery", "answer_nll"),
}


def moves(measured: Measured, default: Measured) -> bool:
    """Say whether a task's gap or recovery is more than a standard error away from the default run's."""
    figures, defaults = five(measured, "layers"), five(default, "layers")
    plugged, tuned = (defaults[name]["acc_stderr"] for name in ("plug_in", "emulator_finetune"))
    gained = defaults["full_finetune"]["acc"] - defaults["zero_shot"]["acc"]
    errors = {"gap": (plugged**2 + tuned**2) ** 0.5, "recovery": plugged / gained if gained > 0 else None}
    return any(
        error is not None and abs(figures[figure]["acc"] - defaults[figure]["acc"]) > error
        for figure, error in errors.items()
    )


def summary(values: list[float | None]) -> tuple[str, str]:
    """Write the mean and, of several, its standard error; nothing where one is undefined."""
    mean, error = over_seeds(values) or (None, None)
    return "" if mean is None else f"{mean:.3f}", "" if error is None else f"{error:.3f}"


def main() -> None:
    tasks = load_params().tasks
    ablations = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

    def measure(names: list[str], seeds: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
        """Return each ablation's metrics, a run a seed."""
        titles = {(name, seed): experiment_name("ablation", name, "seed", seed) for name in names for seed in seeds}
        experiments = {
            title: {"adapters": ["layers"], **ablations[name], "seed": seed} for (name, seed), title in titles.items()
        }
        runs = run_all(experiments, "ablations")
        return {name: [runs[titles[name, seed]].metrics for seed in seeds] for name in names}

    runs = measure(list(ablations), SEEDS[:1])
    default = runs["default"][0]["tasks"]
    moving = [name for name, (run,) in runs.items() if any(moves(run["tasks"][task], default[task]) for task in tasks)]
    for name, more in measure(["default", *moving] if moving else [], SEEDS[1:]).items():
        runs[name] += more
    table = []
    for name, seeds in runs.items():
        perplexity = statistics.fmean(metrics["corpus_perplexity"]["emulator"] for metrics in seeds)
        for task in tasks:
            row: dict[str, Any] = {"ablation": name, "task": task, "seeds": len(seeds)}
            measured = [metrics["tasks"][task]["adapters"]["layers"] for metrics in seeds]
            for column, (figure, metric) in FIGURES.items():
                row[column], row[f"{column} ±"] = summary([adapters[figure][metric] for adapters in measured])
            table.append(row | {"emulator perplexity": round(perplexity, 1)})
    write_csv(OUT, table)
    printed = Table(*table[0], title="one thing changed at a time")
    for row in table:
        printed.add_row(*(str(value) for value in row.values()))
    console.print(printed)


if __name__ == "__main__":
    run_command(main)
