"""Sweep: the dial, α × β, as DVC experiments: what utility and privacy each setting gives, as a table and a picture.

The grid goes into DVC's queue, and as many settings run at once as the machine has room for, also if this is stopped.
What is there already, of this commit, is not run again. `make sweep` runs it, the rest as params.yaml has it.
"""

import itertools
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_file, write_csv
from scaleot_core.common.progress import console
from scaleot_core.params import load_params
from scaleot_core.reporting import figures
from scaleot_core.reporting.measurements import mean
from studies.experiments import Changes, Row, experiment_name, run_all

ALPHAS, BETAS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 0.8, 0.95)
OUT = Path("docs/studies")
ADAPTERS = "layers"  # the dial is the paper's, and so are its adapters
TUNED = ("plug_in", "emulator_finetune")
METRICS = ("acc", "answer_nll")


def setting(alpha: float, beta: float) -> Changes:
    """What one setting changes. With α = 1 no layer is left for β, so that one run serves all."""
    return {"alpha": alpha, "beta": BETAS[0] if alpha == 1 else beta, "adapters": [ADAPTERS]}


def name_of(changes: Changes) -> str:
    """The name of a setting's experiment."""
    return experiment_name("sweep alpha", changes["alpha"], "beta", changes["beta"])


def row_figures(row: Row, tasks: list[str]) -> dict[str, float]:
    """Utility and privacy of one run, each the mean over tasks: plug-in, tuned emulator, gap, and recovery."""
    found: dict[str, float] = {}
    for metric in METRICS:
        for name in ("plug_in", "emulator_finetune", "gap", "recovery"):
            values = [row[f"tasks.{task}.adapters.{ADAPTERS}.{name}.{metric}"] for task in tasks]
            middle = mean(values)
            found[f"{name} {metric}"] = math.nan if middle is None else middle
        errors = [
            sum(row[f"tasks.{task}.adapters.{ADAPTERS}.{name}.{metric}_stderr"] ** 2 for name in TUNED)
            for task in tasks
        ]
        found[f"gap {metric} ±"] = sum(errors) ** 0.5 / len(tasks)
    return found | {"bytes": row["emulator.share_of_model"], "perplexity": row["corpus_perplexity.emulator"]}


def turns(rows: list[dict[str, float]], dial: str, other: str) -> list[str]:
    """Where turning one dial up makes plug-in or tuned emulator better, in answer nll, by over two standard errors."""
    found = []
    for before, after in itertools.permutations(rows, 2):
        if after[other] == before[other] and after[dial] > before[dial]:
            where = f"{dial} {before[dial]} to {after[dial]} at {other} = {after[other]}"
            for name in TUNED:
                gained = before[f"{name} answer_nll"] - after[f"{name} answer_nll"]
                if gained > 2 * after["gap answer_nll ±"]:
                    found.append(f"{where}: {name} gains {gained:.2f} nats")
    return found


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw gap against recovery in answer nll, one line a β along α.

    Two points lie within the error of each other in accuracy, so it isn't drawn.
    """
    figure = figures.frontier(figures.by_beta(rows), [figures.GAP_NLL])
    with atomic_file(path) as temporary:
        figures.save_png(figure, temporary)


def main() -> None:
    tasks = load_params().tasks
    grid = [(alpha, beta) for alpha in ALPHAS for beta in BETAS]
    found = dict(run_all({name_of(changes): changes for changes in itertools.starmap(setting, grid)}, "sweep"))
    rows: list[dict[str, Any]] = [
        {"alpha": alpha, "beta": beta, **row_figures(found[name_of(setting(alpha, beta))], tasks)}
        for alpha, beta in grid
    ]
    write_csv(OUT / "sweep.csv", rows)
    draw(OUT / "sweep.png", rows)
    table = Table(*rows[0], title=f"the dial: means over {', '.join(tasks)}")
    for row in rows:
        table.add_row(*(f"{value:.3g}" for value in row.values()))
    console.print(table)
    for line in turns(rows, "alpha", "beta") + turns(rows, "beta", "alpha"):
        console.print(f"not monotone: {line}", style="yellow")


if __name__ == "__main__":
    run_command(main)
