"""The five measurements put together: gap and recovery, the table a person reads, CSV for DVC's plots."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from scaleot_core.errors import UserError
from scaleot_core.files import whole_file
from scaleot_core.progress import console

MEASUREMENTS = ("zero_shot", "full_finetune", "emulator_zero_shot", "emulator_finetune", "plug_in")
Measured = Mapping[str, Any]
"""Of one task the five measurements, each with its figures, and what they are: `metrics` and `less_is_better`."""


def _values(measured: Measured, metric: str) -> dict[str, float]:
    """The five measurements in one metric, with the sign turned where less is better, as in a perplexity."""
    sign = -1 if metric in measured["less_is_better"] else 1
    return {name: sign * measured[name][metric] for name in MEASUREMENTS}


def utility(measured: Measured) -> dict[str, dict[str, float | None]]:
    """Gap and recovery of one task (method, "The two parties"), in each of its `metrics`.

    Gap = plug_in − emulator_finetune; recovery = (plug_in − zero_shot) / (full_finetune − zero_shot), None where full
    fine-tuning gained nothing. More is better in both, whatever the metric.
    """
    found: dict[str, dict[str, float | None]] = {"gap": {}, "recovery": {}}
    for metric in measured["metrics"]:
        value = _values(measured, metric)
        ceiling = value["full_finetune"] - value["zero_shot"]
        found["gap"][metric] = value["plug_in"] - value["emulator_finetune"]
        found["recovery"][metric] = (value["plug_in"] - value["zero_shot"]) / ceiling if ceiling > 0 else None
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Their mean, None where there is none or one is undefined, as a recovery may be."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def over_seeds(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and, of several, its standard error; None where a seed has no figure, as an undefined recovery."""
    known, middle = [value for value in values if value is not None], mean(values)
    if middle is None:
        return None
    return middle, statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def judged_by(measured: Measured) -> list[str]:
    """The metrics that a task is judged by: its first, and the last, which is the least noisy."""
    return list(dict.fromkeys([measured["metrics"][0], measured["metrics"][-1]]))


def misordered(measured: Measured) -> list[str]:
    """What is not as the method promises, in the metrics that count; an empty list is the promise kept."""
    wrong = []
    for metric in judged_by(measured):
        value = _values(measured, metric)
        for lower in ("zero_shot", "emulator_finetune"):
            if value["plug_in"] <= value[lower]:
                wrong.append(f"plug_in is not better than {lower} in {metric}")
    return wrong


def measurement_table(tasks: Mapping[str, Measured]) -> Table:
    """The five measurements of every task, each with its standard error."""
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
        for name in MEASUREMENTS:
            table.add_row(f"  {name}", *(cell(measured[name], metric) for metric in metrics))
    return table


def show(metrics: Mapping[str, Any]) -> None:
    """Print the measurements and what they come to."""
    console.print(measurement_table(metrics["tasks"]))
    for task, measured in metrics["tasks"].items():
        metric = measured["metrics"][0]
        gap, recovery = measured["gap"][metric], measured["recovery"][metric]
        share = "undefined (full fine-tuning gained nothing)" if recovery is None else f"{recovery:.2f}"
        console.print(f"{task}: gap {gap:+.3f} in {metric}, recovery {share}")
        for line in misordered(measured):
            console.print(f"  note: {line}", style="yellow")
    emulator, perplexity = metrics["emulator"], metrics["corpus_perplexity"]
    console.print(
        f"emulator: {emulator['share_of_model']:.0%} of the model's bytes; "
        f"corpus perplexity {perplexity['emulator']:.1f} against the model's {perplexity['model']:.1f}"
    )


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a header and rows as CSV."""
    with whole_file(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV by its header, numbers as numbers; UserError if it is missing."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    try:
        with path.open(newline="") as stream:
            return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(stream)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None


def write_curves(folder: Path, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Loss curves as one CSV a stage, `<folder>/<stage>.csv`: step, loss."""
    for stage, history in histories.items():
        write_csv(folder / f"{stage}.csv", ["step", "loss"], ([row["step"], row["loss"]] for row in history))


def write_layers(path: Path, prior: Sequence[float], scores: Sequence[float], kinds: Sequence[str]) -> None:
    """Per-layer scores as one CSV: layer, prior, score, kind."""
    rows = zip(range(len(scores)), prior, scores, kinds, strict=True)
    write_csv(path, ["layer", "prior", "score", "kind"], rows)
