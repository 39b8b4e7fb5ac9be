"""Compare: all methods on the same model, tasks, seeds, bytes and tuning, as DVC experiments; a table.

Every method's emulator is tuned twice, by its own adapter layers and by LoRA in every layer that it has: a row each.
Utility is what the plug-in has, privacy what the tuned emulator lacks of it. `make compare` runs it; on a GPU
`make compare SET="data.train_questions=4000"` runs it larger. Every run's figures are kept in compare-runs.csv, so that
a stopped comparison goes on, on another machine too.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml
from rich.table import Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_csv
from scaleot_core.common.progress import console
from scaleot_core.reporting.tables import replace_between_marks
from studies.columns import by_kind, comparison_columns
from studies.experiments import Figures, Run, cached_figures, experiment_name, parse_overrides
from studies.means import ROW_NAMES, Means, mean_text, seed_means, spread

SETTINGS = Path(__file__).with_suffix(".yaml")
RUNS, OUT, LOG = Path("docs/studies/compare-runs.csv"), Path("docs/studies/compare.csv"), Path("docs/results.md")
SHOWN: dict[str, Callable[..., str] | None] = {  # in the table, and which is the best; the CSV file has more
    "recovery acc": max,
    "recovery nll": max,
    "plug-in nll": min,
    "tuned emulator nll": max,
    "gap acc": max,
    "gap nll": max,
    "share of bytes": None,
    "perplexity": None,
}


def winner(rows: Mapping[str, Means], column: str) -> str | None:
    """Name the row that wins a column, if it is a race and any row has a figure."""
    means = {name: mean[0] for name, columns in rows.items() if (mean := columns[column])}
    best = SHOWN[column]
    return best(means, key=means.__getitem__) if best and means else None


def table_lines(rows: Mapping[str, Means], bold: str) -> list[list[str]]:
    """Write the rows as the table has them; a column's winner is put into `bold`."""
    winners = {column: winner(rows, column) for column in SHOWN}
    return [
        [name, *((bold if name == winners[column] else "{}").format(mean_text(means[column])) for column in SHOWN)]
        for name, means in rows.items()
    ]


def markdown(rows: Mapping[str, Means], about: str) -> str:
    """Write the table as the results have it."""
    lines = [f"| {about} | {' | '.join(SHOWN)} |", "| --- |" + " --- |" * len(SHOWN)]
    return "\n".join(lines + [f"| {' | '.join(line)} |" for line in table_lines(rows, "**{}**")])


def main() -> None:
    study, overrides = yaml.safe_load(SETTINGS.read_text(encoding="utf-8")), parse_overrides(sys.argv[1:])
    changes, methods, seeds = {**study["changes"], **overrides}, study["methods"], study["seeds"]

    def name(method: str, seed: int) -> str:
        return experiment_name("compare", method, "seed", seed, *sys.argv[1:])

    def measure(name: str, run: Run) -> Figures:
        metrics = run.metrics
        return by_kind(lambda kind: comparison_columns(metrics, kind), ROW_NAMES)

    experiments = {
        name(method, seed): {**changes, "method": method.partition(",")[0], **variant, "seed": seed}
        for seed in seeds
        for method, variant in methods.items()
    }
    runs = cached_figures(RUNS, experiments, measure, "compare")
    rows = {
        row_name.format(method): seed_means([runs[name(method, seed)] for seed in seeds], kind)
        for method in methods
        for kind, row_name in ROW_NAMES.items()
    }
    write_csv(OUT, [{"method": name, **spread(means)} for name, means in rows.items()])
    about = "; ".join([f"means of {', '.join(changes['tasks'])}", f"{len(seeds)} seeds", *sys.argv[1:]])
    replace_between_marks(LOG, "compare", markdown(rows, about))
    table = Table("", *SHOWN, title=about)
    for line in table_lines(rows, "[bold]{}[/]"):
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
