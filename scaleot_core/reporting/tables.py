"""Show measurements as tables on the console, and write the CSV that DVC's plots read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_file, write_csv
from scaleot_core.common.progress import console
from scaleot_core.reporting.measurements import Measured, by_row, five, misordered


def measurement_table(tasks: Mapping[str, Measured]) -> Table:
    """Build the table of the five measurements of every task, each with its standard error."""
    table = Table(title="The five measurements (our own splits, not the official ones)")
    table.add_column("", no_wrap=True)
    metrics = list(dict.fromkeys(metric for measured in tasks.values() for metric in measured["metrics"]))
    for metric in metrics:
        table.add_column(metric, justify="right")

    def cell(figures: Mapping[str, Any], metric: str) -> str:
        return f"{figures[metric]:.3f} ± {figures[metric + '_stderr']:.3f}" if metric in figures else "–"

    for task, measured in tasks.items():
        table.add_section()
        table.add_row(task, style="bold")
        for name, figures in by_row(measured).items():
            table.add_row(f"  {name}", *(cell(figures, metric) for metric in metrics))
    return table


def show(metrics: Mapping[str, Any]) -> None:
    """Print the measurements and what they come to."""
    console.print(measurement_table(metrics["tasks"]))
    for task, measured in metrics["tasks"].items():
        metric = measured["metrics"][0]
        for kind, figures in measured["adapters"].items():
            gap, recovery = figures["gap"][metric], figures["recovery"][metric]
            share = "undefined (full fine-tuning gained nothing)" if recovery is None else f"{recovery:.2f}"
            console.print(f"{task}, adapters {kind}: gap {gap:+.3f} in {metric}, recovery {share}")
            for line in misordered(five(measured, kind)):
                console.print(f"  note: {line}", style="yellow")
    emulator, perplexity = metrics["emulator"], metrics["corpus_perplexity"]
    console.print(
        f"emulator: {emulator['share_of_model']:.0%} of the model's bytes; "
        f"corpus perplexity {perplexity['emulator']:.1f} against the model's {perplexity['model']:.1f}"
    )


def replace_between_marks(path: Path, name: str, text: str) -> None:
    """Replace a document's text between `<!-- name -->` and `<!-- end of name -->`; UserError if a mark is missing."""
    document = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, begins, rest = document.partition(begin)
    _, ends, after = rest.partition(end)
    if not (begins and ends):
        raise UserError(
            f"{path}: the marks {begin.strip()} and {end.strip()} are missing; put them where the text goes"
        )
    with atomic_file(path) as temporary:
        temporary.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}", encoding="utf-8")


def write_curves(folder: Path, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Write loss curves as one CSV per stage, `<folder>/<stage>.csv`: step, loss."""
    for stage, history in histories.items():
        write_csv(folder / f"{stage}.csv", history, ["step", "loss"])


def write_layers(path: Path, prior: Sequence[float], scores: Sequence[float], kinds: Sequence[str]) -> None:
    """Write per-layer scores as one CSV: layer, prior, score, kind; scores are empty for a method that needs none."""
    unscored = [""] * len(kinds)
    rows = zip(range(len(kinds)), prior or unscored, scores or unscored, kinds, strict=True)
    columns = ("layer", "prior", "score", "kind")
    write_csv(path, [dict(zip(columns, row, strict=True)) for row in rows], columns)
