"""Compare: all methods on the same model, tasks, seeds, bytes and tuning, as DVC experiments; a table.

Every method's emulator is tuned twice, by its own adapter layers and by LoRA in every layer that it has: a row each.
Utility is what the plug-in has, privacy what the tuned emulator lacks of it; cost is what preparing the emulator took:
for ScaleOT layer importance, DLR and compression, for the others compression. `make compare` runs it; on a GPU
`make compare SET="data.train_questions=4000"` runs it larger.

Every run's figures are kept in compare-runs.csv, with a hash of its parameters and of the code that DVC's stages depend
on. A run that is there, or is a DVC experiment of this commit, is not made again, so that a stopped comparison goes on,
on another machine too: on one like the first, since seconds and MiB are the machine's.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_file, write_csv
from scaleot_core.common.progress import console
from scaleot_core.reporting.measurements import MEASUREMENTS, mean, of_kind, over_seeds, utility
from studies.experiments import (
    EMULATOR_STAGES,
    Changes,
    Figures,
    cached_figures,
    experiment_name,
    parse_overrides,
    read_metrics,
    run,
)

SETTINGS = Path(__file__).with_suffix(".yaml")
RUNS, OUT, LOG = Path("docs/studies/compare-runs.csv"), Path("docs/studies/compare.csv"), Path("docs/results.md")
BEGIN, END = "<!-- compare -->\n", "<!-- end of compare -->\n"
KINDS = {"layers": "{}", "lora": "{}, lora"}  # of adapters, and the names of a method's rows
PREPARED = {"scaleot": EMULATOR_STAGES}  # the others: compress alone

Figure = Callable[[dict[str, Any], str], float | None]
"""From a run's metrics.json, as of one kind of adapters, and its method."""
Cell = tuple[float, float] | None
Rows = dict[str, dict[str, Cell]]
"""Of every method and kind of adapters its columns: mean and standard error over seeds."""


def over_tasks(*path: str) -> Figure:
    """The mean over tasks of a figure in metrics.json, None where a task has none."""

    def figure(metrics: dict[str, Any], method: str) -> float | None:
        return mean([measured[path[0]][path[1]] for measured in metrics["tasks"].values()])

    return figure


def recovery(metric: str) -> Figure:
    """Recovery of the means over tasks: where a task has little to gain, its own would divide by next to nothing."""

    def figure(metrics: dict[str, Any], method: str) -> float | None:
        tasks = metrics["tasks"].values()
        means = {name: {metric: mean([measured[name][metric] for measured in tasks])} for name in MEASUREMENTS}
        return utility({**means, "metrics": [metric], "lower_is_better": ["answer_nll"]})["recovery"][metric]

    return figure


def prepared(figure: str, total: Callable[..., float] = sum) -> Figure:
    """What preparing the emulator cost, over its stages."""
    return lambda metrics, method: total(
        metrics["cost"][stage][figure] for stage in PREPARED.get(method, ("compress",))
    )


# Columns: where a figure comes from, and whether more of it is better; None for what isn't a race.
COLUMNS: dict[str, tuple[Figure, bool | None]] = {
    "recovery acc": (recovery("acc"), True),
    "recovery nll": (recovery("answer_nll"), True),
    "plug-in acc": (over_tasks("plug_in", "acc"), True),
    "plug-in nll": (over_tasks("plug_in", "answer_nll"), False),
    "emulator acc": (over_tasks("emulator_zero_shot", "acc"), False),
    "tuned emulator acc": (over_tasks("emulator_finetune", "acc"), False),
    "tuned emulator nll": (over_tasks("emulator_finetune", "answer_nll"), True),
    "gap acc": (over_tasks("gap", "acc"), True),
    "gap nll": (over_tasks("gap", "answer_nll"), True),
    "share of bytes": (lambda metrics, method: metrics["emulator"]["share_of_model"], None),
    "perplexity": (lambda metrics, method: metrics["corpus_perplexity"]["emulator"], None),
    "tokens": (prepared("tokens"), False),
    "seconds": (prepared("seconds"), False),
    "MiB": (prepared("peak_memory_mib", max), False),
}
SHOWN = (  # of them, in the table; the CSV file has all
    *("recovery acc", "recovery nll", "plug-in nll", "tuned emulator nll"),
    *("gap acc", "gap nll", "share of bytes", "perplexity"),
)


def run_figures(metrics: dict[str, Any], method: str) -> Figures:
    """The columns of one run, for each kind of adapters."""
    return {
        f"{column}, {kind}": figure(of_kind(metrics, kind), method)
        for kind in KINDS
        for column, (figure, _) in COLUMNS.items()
    }


def rows_of(runs: dict[str, list[Figures]]) -> Rows:
    """The rows of every method from its runs' figures; one seed alone has no error."""
    rows: Rows = {}
    for method, found in runs.items():
        for kind, name in KINDS.items():
            cells = {column: over_seeds([figures[f"{column}, {kind}"] for figures in found]) for column in COLUMNS}
            rows[name.format(method)] = {c: cell and (cell[0], cell[1] or 0.0) for c, cell in cells.items()}
    return rows


def best(rows: Rows, column: str) -> str | None:
    """The method that wins a column."""
    more, means = COLUMNS[column][1], {m: cells[column] for m, cells in rows.items()}
    known = {method: cell[0] for method, cell in means.items() if cell is not None}
    if more is None or not known:
        return None
    return (max if more else min)(known, key=known.__getitem__)


def shown(cell: Cell) -> str:
    """A cell for a person."""
    if cell is None:
        return "–"
    mean, error = cell
    if mean >= 100:
        return f"{mean:,.0f} ± {error:,.0f}"
    return f"{mean:.3f} ± {error:.3f}" if mean < 3 else f"{mean:.2f} ± {error:.2f}"


def lines_of(rows: Rows, bold: str) -> list[list[str]]:
    """The table's lines, a method and a kind of adapters each; a column's winner is put into `bold`."""
    winners = {column: best(rows, column) for column in SHOWN}
    return [
        [method, *((bold if method == winners[c] else "{}").format(shown(cells[c])) for c in SHOWN)]
        for method, cells in rows.items()
    ]


def csv_row(method: str, cells: Mapping[str, Cell]) -> dict[str, Any]:
    """Spread a method's columns over means and standard errors, as the CSV file has them."""
    row: dict[str, Any] = {"method": method}
    for column, cell in cells.items():
        row[column], row[f"{column} ±"] = cell or (None, None)
    return row


def write_log(rows: Rows, about: str) -> None:
    """Put the table between the two marks in the results log."""
    lines = [f"| {about} | {' | '.join(SHOWN)} |", "| --- |" + " --- |" * len(SHOWN)]
    lines += [f"| {' | '.join(line)} |" for line in lines_of(rows, "**{}**")]
    text = LOG.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(
            f"{LOG}: the marks {BEGIN.strip()} and {END.strip()} are missing; put them where the table goes"
        )
    text = text.partition(BEGIN)[0] + BEGIN + "\n".join(lines) + "\n" + END + text.partition(END)[2]
    with atomic_file(LOG) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    compared = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    changes = {**compared["changes"], **parse_overrides(sys.argv[1:])}
    rows_wanted = {
        name: {**changes, "method": name.partition(",")[0], **own} for name, own in compared["methods"].items()
    }

    def name_of(row: str, seed: int) -> str:
        return experiment_name("compare", row, "seed", seed, *sys.argv[1:])

    def make(missing: Mapping[str, Changes]) -> Iterator[tuple[str, Figures]]:
        for name, own in missing.items():
            metrics = read_metrics(run(name, own))
            yield name, run_figures(metrics, own["method"])

    seeds = compared["seeds"]
    wanted = {name_of(row, seed): {**own, "seed": seed} for seed in seeds for row, own in rows_wanted.items()}
    columns = [f"{column}, {kind}" for kind in KINDS for column in COLUMNS]
    found = cached_figures(RUNS, columns, wanted, make, "dvc.yaml")
    rows = rows_of({row: [found[name_of(row, seed)] for seed in seeds] for row in rows_wanted})
    write_csv(OUT, [csv_row(method, cells) for method, cells in rows.items()])
    about = "; ".join([f"means of {', '.join(changes['tasks'])}", f"{len(seeds)} seeds", *sys.argv[1:]])
    write_log(rows, about)
    table = Table("", *SHOWN, title=about)
    for line in lines_of(rows, "[bold]{}[/]"):
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
