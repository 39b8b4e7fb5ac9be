"""Sweep: the dial, α × β, as DVC experiments: what utility and privacy each setting gives, as a table and a picture.

As many settings run at once as the machine has room for; finished ones of this commit are not run again. `make sweep`
runs it, the rest as params.yaml has it.
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
from scaleot_core.reporting.measurements import of_kind
from studies.columns import Metrics, over_tasks
from studies.experiments import experiment_name, run_all
from studies.keys import Changes

ALPHAS, BETAS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 0.8, 0.95)
OUT = Path("docs/studies")
ADAPTERS = "layers"  # the dial is the paper's, and so are its adapters
TUNED = ("plug_in", "emulator_finetune")


def setting(alpha: float, beta: float) -> Changes:
    """Return what one setting changes. With α = 1 no layer is left for β, so that one run serves all."""
    return {"alpha": alpha, "beta": BETAS[0] if alpha == 1 else beta, "adapters": [ADAPTERS]}


def name_of(changes: Changes) -> str:
    """Name a setting's experiment."""
    return experiment_name("sweep alpha", changes["alpha"], "beta", changes["beta"])


def sweep_columns(metrics: Metrics) -> dict[str, float]:
    """Read utility and privacy of one run, means over tasks; NaN for an undefined one."""
    tasks, columns = of_kind(metrics, ADAPTERS)["tasks"].values(), dict[str, float]()
    for metric in ("acc", "answer_nll"):
        for name in (*TUNED, "gap", "recovery"):
            value = over_tasks(metrics, ADAPTERS, name, metric)
            columns[f"{name} {metric}"] = math.nan if value is None else value
        variances = [task[name][f"{metric}_stderr"] ** 2 for task in tasks for name in TUNED]
        columns[f"gap {metric} ±"] = sum(variances) ** 0.5 / len(tasks)
    bytes_share, perplexity = metrics["emulator"]["share_of_model"], metrics["corpus_perplexity"]["emulator"]
    return columns | {"bytes": bytes_share, "perplexity": perplexity}


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw gap against recovery in answer NLL, one line a β along α; accuracy is too noisy to draw."""
    figure = figures.frontier(figures.by_beta(rows), [figures.GAP_NLL])
    with atomic_file(path) as temporary:
        figures.save_png(figure, temporary)


def main() -> None:
    grid = list(itertools.product(ALPHAS, BETAS))
    runs = run_all({name_of(changes): changes for changes in itertools.starmap(setting, grid)}, "sweep")
    rows: list[dict[str, Any]] = [
        {"alpha": alpha, "beta": beta, **sweep_columns(runs[name_of(setting(alpha, beta))].metrics)}
        for alpha, beta in grid
    ]
    write_csv(OUT / "sweep.csv", rows)
    draw(OUT / "sweep.png", rows)
    table = Table(*rows[0], title=f"the dial: means over {', '.join(load_params().tasks)}")
    for row in rows:
        table.add_row(*(f"{value:.3g}" for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
