"""The five measurements put together: metrics, the table a person reads, plots for DVC, pictures for offline."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from scaleot_core.files import whole_file
from scaleot_core.progress import console

MEASUREMENTS = ("zero_shot", "full_finetune", "emulator_zero_shot", "emulator_finetune", "plug_in")
KIND_COLOURS = {
    "adapter": "#d1495b",
    "compressed": "#00798c",
    "harmonizer": "#edae49",
    "shared": "#9aa5b1",
    "removed": "#d8d8d8",
}
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


def _shown(measured: Measured) -> list[str]:
    """The metrics that a task is judged by: its first, and the last, which is the least noisy."""
    return list(dict.fromkeys([measured["metrics"][0], measured["metrics"][-1]]))


def misordered(measured: Measured) -> list[str]:
    """What is not as the method promises, in the metrics that count; an empty list is the promise kept."""
    wrong = []
    for metric in _shown(measured):
        value = _values(measured, metric)
        for lower in ("zero_shot", "emulator_finetune"):
            if value["plug_in"] <= value[lower]:
                wrong.append(f"plug_in is not better than {lower} in {metric}")
    return wrong


def measurement_table(tasks: Mapping[str, Measured]) -> Table:
    """The five measurements of every task, each with its standard error."""
    table = Table(title="The five measurements (our own splits, not the official ones)")
    table.add_column("")
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


def write_curves(folder: Path, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Loss curves as one CSV a stage, `<folder>/<stage>.csv`: step, loss."""
    for stage, history in histories.items():
        write_csv(folder / f"{stage}.csv", ["step", "loss"], ([row["step"], row["loss"]] for row in history))


def write_layers(path: Path, prior: Sequence[float], scores: Sequence[float], kinds: Sequence[str]) -> None:
    """Per-layer scores as one CSV: layer, prior, score, kind."""
    rows = zip(range(len(scores)), prior, scores, kinds, strict=True)
    write_csv(path, ["layer", "prior", "score", "kind"], rows)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files and in our style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120})
    return plt


def draw(folder: Path, metrics: Mapping[str, Any], histories: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """Draw measurements.png, layers.png and curves.png into a folder."""
    plt = pyplot()
    _draw_measurements(plt, folder / "measurements.png", metrics["tasks"])
    _draw_layers(plt, folder / "layers.png", layers)
    _draw_curves(plt, folder / "curves.png", histories)


def save_figure(plt: Any, figure: Any, path: Path) -> None:
    """Write a figure as PNG, whatever the file's name, and close it."""
    figure.tight_layout()
    figure.savefig(path, format="png", metadata={"Software": None})
    plt.close(figure)


def _draw_measurements(plt: Any, path: Path, tasks: Mapping[str, Measured]) -> None:
    colours = ["#9aa5b1", "#3e4c59", "#edae49", "#e07b39", "#d1495b"]
    figure, rows = plt.subplots(2, len(tasks), figsize=(4.2 * len(tasks), 6.4), squeeze=False)
    for column, (task, measured) in enumerate(tasks.items()):
        for axis in rows[len(_shown(measured)) :, column]:
            axis.axis("off")
        for axis, metric in zip(rows[:, column], _shown(measured), strict=False):
            values = [measured[name][metric] for name in MEASUREMENTS]
            errors = [measured[name][f"{metric}_stderr"] for name in MEASUREMENTS]
            axis.bar(range(5), values, yerr=errors, color=colours, capsize=3)
            low, high = min(values) - 2 * max(errors), max(values) + 2 * max(errors) or 1.0
            axis.set_ylim(max(0, low - 0.3 * (high - low)), high)
            axis.set_xticks(range(5), [name.replace("_", "\n") for name in MEASUREMENTS], fontsize=7)
            better = "less" if metric in measured["less_is_better"] else "more"
            axis.set_title(f"{task}\n{metric} ({better} is better)", fontsize=9)
    save_figure(plt, figure, path)


def _draw_layers(plt: Any, path: Path, layers: Mapping[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(8.4, 3.2))
    for kind, colour in KIND_COLOURS.items():
        members = [i for i, k in enumerate(layers["kinds"]) if k == kind]
        if members:
            axis.bar(members, [layers["scores"][i] for i in members], color=colour, label=kind)
    axis.plot(range(len(layers["prior"])), layers["prior"], "k.", markersize=4, label="prior")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("score")
    axis.legend(fontsize=8, ncols=4, frameon=False)
    save_figure(plt, figure, path)


def _draw_curves(plt: Any, path: Path, histories: Mapping[str, Any]) -> None:
    columns = min(3, len(histories))
    count = math.ceil(len(histories) / columns)
    figure, axes = plt.subplots(count, columns, figsize=(4 * columns, 2.6 * count), squeeze=False)
    for axis in axes.flat[len(histories) :]:
        axis.axis("off")
    for axis, (stage, history) in zip(axes.flat, histories.items(), strict=False):
        axis.plot([row["step"] for row in history], [row["loss"] for row in history], linewidth=0.9)
        axis.set_title(stage, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("loss", fontsize=8)
    save_figure(plt, figure, path)
