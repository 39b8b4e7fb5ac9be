"""Ablations: the pipeline with one thing changed at a time, as DVC experiments.

The first seed screens; an ablation that moves gap or recovery of a task by more than a standard error gets the other
seeds. Experiments that are there already, of this commit, are not run again. `make ablations` runs it.
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
from scaleot_core.reporting.measurements import over_seeds
from studies.experiments import Row, experiment_name, run

SEEDS = (0, 1, 2)
OUT = Path("docs/studies/ablations.csv")
FIGURES = {
    "gap": "adapters.layers.gap.acc",
    "recovery": "adapters.layers.recovery.acc",
    "gap nll": "adapters.layers.gap.answer_nll",
    "recovery nll": "adapters.layers.recovery.answer_nll",
}


def trial(name: str, changes: dict[str, Any], seed: int) -> Row:
    """One ablation with one seed."""
    return run(experiment_name("ablation", name, "seed", seed), {"adapters": ["layers"], **changes, "seed": seed})


def moves(row: Row, default: Row, tasks: list[str]) -> bool:
    """Whether gap or recovery of a task is more than a standard error away from the default run's."""
    for task in tasks:
        prefix = f"tasks.{task}.adapters.layers"
        plugged, tuned = (default[f"{prefix}.{name}.acc_stderr"] for name in ("plug_in", "emulator_finetune"))
        gained = default[f"tasks.{task}.full_finetune.acc"] - default[f"tasks.{task}.zero_shot.acc"]
        errors = {"gap": (plugged**2 + tuned**2) ** 0.5, "recovery": plugged / gained if gained > 0 else None}
        for figure, error in errors.items():
            here, there = row[f"{prefix}.{figure}.acc"], default[f"{prefix}.{figure}.acc"]
            if error is not None and abs(here - there) > error:
                return True
    return False


def summary(values: list[float | None]) -> tuple[str, str]:
    """Mean and, of several, its standard error; nothing where one is undefined."""
    mean, error = over_seeds(values) or (None, None)
    return "" if mean is None else f"{mean:.3f}", "" if error is None else f"{error:.3f}"


def main() -> None:
    tasks = load_params().tasks
    ablations = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    rows: dict[str, list[Row]] = {name: [trial(name, changes, SEEDS[0])] for name, changes in ablations.items()}
    default = rows["default"][0]
    confirmed = [name for name, (row,) in rows.items() if name == "default" or moves(row, default, tasks)]
    for name in confirmed if len(confirmed) > 1 else ():
        rows[name] += [trial(name, ablations[name], seed) for seed in SEEDS[1:]]
    table = []
    for name, found in rows.items():
        for task in tasks:
            line: Row = {"ablation": name, "task": task, "seeds": len(found)}
            for figure, key in FIGURES.items():
                line[figure], line[f"{figure} ±"] = summary([row[f"tasks.{task}.{key}"] for row in found])
            line["emulator perplexity"] = round(statistics.fmean(row["corpus_perplexity.emulator"] for row in found), 1)
            table.append(line)
    write_csv(OUT, table)
    shown = Table(*table[0], title="one thing changed at a time")
    for line in table:
        shown.add_row(*(str(value) for value in line.values()))
    console.print(shown)


if __name__ == "__main__":
    run_command(main)
