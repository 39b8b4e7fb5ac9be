"""Compare: all methods on the same model, tasks, seeds, bytes and tuning, as DVC experiments; a table.

Every method's emulator is tuned twice, by its own adapter layers and by LoRA in every layer that it has: a row each.
Utility is what the plug-in has, privacy what the tuned emulator lacks of it; cost is what preparing the emulator took:
for ScaleOT layer importance, DLR and compression, for the others compression. `make compare` runs it; on a GPU
`make compare SET="data.train_questions=4000"` runs it larger.

Every run's figures are kept in compare-runs.csv, so that a stopped comparison goes on, on another machine too: on one
like the first, since seconds and MiB are the machine's, with as many experiments at once as it has room for.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_file, write_csv
from scaleot_core.common.progress import console
from scaleot_core.reporting.measurements import over_seeds
from studies.columns import by_kind, comparison_columns
from studies.experiments import Figures, Run, cached_figures, experiment_name, parse_overrides

SETTINGS = Path(__file__).with_suffix(".yaml")
RUNS, OUT, LOG = Path("docs/studies/compare-runs.csv"), Path("docs/studies/compare.csv"), Path("docs/results.md")
BEGIN, END = "<!-- compare -->\n", "<!-- end of compare -->\n"
KINDS = {"layers": "{}", "lora": "{}, lora"}  # of adapters, and the names of a method's rows

Cell = tuple[float, float | None]
"""Mean and standard error over seeds; one seed alone has none."""
Rows = dict[str, dict[str, Cell | None]]
"""The columns of every method with every kind of adapters; None where a seed has no figure."""

# Whether more of a column is better; None for what isn't a race.
COLUMNS: dict[str, bool | None] = {
    "recovery acc": True,
    "recovery nll": True,
    "plug-in acc": True,
    "plug-in nll": False,
    "emulator acc": False,
    "tuned emulator acc": False,
    "tuned emulator nll": True,
    "gap acc": True,
    "gap nll": True,
    "share of bytes": None,
    "perplexity": None,
    "tokens": False,
    "seconds": False,
    "MiB": False,
}
SHOWN = (  # of them, in the table; the CSV file has all
    *("recovery acc", "recovery nll", "plug-in nll", "tuned emulator nll"),
    *("gap acc", "gap nll", "share of bytes", "perplexity"),
)


def method_rows(runs: Mapping[str, Sequence[Figures]]) -> Rows:
    """Average each method's runs: a row for each kind of adapters."""
    return {
        row_name.format(method): {
            column: over_seeds([figures[f"{column}, {kind}"] for figures in seeds]) for column in COLUMNS
        }
        for method, seeds in runs.items()
        for kind, row_name in KINDS.items()
    }


def winner(rows: Rows, column: str) -> str | None:
    """Name the row that wins a column, if it is a race and any row has a figure."""
    means = {name: cell[0] for name, cells in rows.items() if (cell := cells[column])}
    if COLUMNS[column] is None or not means:
        return None
    return (max if COLUMNS[column] else min)(means, key=means.__getitem__)


def cell_text(cell: Cell | None) -> str:
    """Write a cell for a person."""
    if cell is None:
        return "–"
    mean, error = cell[0], cell[1] or 0.0
    if mean >= 100:
        return f"{mean:,.0f} ± {error:,.0f}"
    return f"{mean:.3f} ± {error:.3f}" if mean < 3 else f"{mean:.2f} ± {error:.2f}"


def table_lines(rows: Rows, bold: str) -> list[list[str]]:
    """Write the rows as the table has them; a column's winner is put into `bold`."""
    winners = {column: winner(rows, column) for column in SHOWN}
    return [
        [name, *((bold if name == winners[column] else "{}").format(cell_text(cells[column])) for column in SHOWN)]
        for name, cells in rows.items()
    ]


def csv_row(name: str, cells: Mapping[str, Cell | None]) -> dict[str, Any]:
    """Spread a row's columns over means and standard errors, as the CSV file has them."""
    row: dict[str, Any] = {"method": name}
    for column, cell in cells.items():
        row[column], row[f"{column} ±"] = cell or (None, None)
    return row


def write_log(rows: Rows, about: str) -> None:
    """Put the table between the two marks in the results log; UserError where they are missing."""
    lines = [f"| {about} | {' | '.join(SHOWN)} |", "| --- |" + " --- |" * len(SHOWN)]
    lines += [f"| {' | '.join(line)} |" for line in table_lines(rows, "**{}**")]
    text = LOG.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(
            f"{LOG}: the marks {BEGIN.strip()} and {END.strip()} are missing; put them where the table goes"
        )
    text = text.partition(BEGIN)[0] + BEGIN + "\n".join(lines) + "\n" + END + text.partition(END)[2]
    with atomic_file(LOG) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    study, overrides = yaml.safe_load(SETTINGS.read_text(encoding="utf-8")), parse_overrides(sys.argv[1:])
    changes, methods, seeds = {**study["changes"], **overrides}, study["methods"], study["seeds"]

    def name(method: str, seed: int) -> str:
        return experiment_name("compare", method, "seed", seed, *sys.argv[1:])

    def measure(name: str, run: Run) -> Figures:
        metrics, method = run.metrics, experiments[name]["method"]
        return by_kind(lambda kind: comparison_columns(metrics, kind, method), KINDS)

    experiments = {
        name(method, seed): {**changes, "method": method.partition(",")[0], **variant, "seed": seed}
        for seed in seeds
        for method, variant in methods.items()
    }
    columns = [f"{column}, {kind}" for kind in KINDS for column in COLUMNS]
    runs = cached_figures(RUNS, columns, experiments, measure, "compare")
    rows = method_rows({method: [runs[name(method, seed)] for seed in seeds] for method in methods})
    write_csv(OUT, [csv_row(name, cells) for name, cells in rows.items()])
    about = "; ".join([f"means of {', '.join(changes['tasks'])}", f"{len(seeds)} seeds", *sys.argv[1:]])
    write_log(rows, about)
    table = Table("", *SHOWN, title=about)
    for line in table_lines(rows, "[bold]{}[/]"):
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
