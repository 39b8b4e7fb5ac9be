"""Pictures of what was measured, by matplotlib: as PNG beside the metrics, as SVG in the report."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from scaleot_core.reporting.labels import Label, write_labels
from scaleot_core.reporting.measurements import Measured, by_row, judged_by

matplotlib.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "scaleot",  # the same figures give the same bytes
    }
)
LAYER_KINDS = {  # colour, words
    "adapter": ("#d1495b", "adapter layer"),
    "compressed": ("#00798c", "compressed, frozen"),
    "harmonizer": ("#edae49", "replaced by a harmonizer"),
    "shared": ("#9aa5b1", "replaced by another layer"),
    "removed": ("#d8d8d8", "removed"),
}
MEASUREMENTS = {  # colour, words
    "zero_shot": ("#9aa5b1", "original model"),
    "full_finetune": ("#3e4c59", "full fine-tuning"),
    "emulator_zero_shot": ("#edae49", "untuned package"),
    "emulator_finetune": ("#e07b39", "tuned emulator"),
    "plug_in": ("#d1495b", "plug-in"),
}
WORDS = {
    "acc": "accuracy",
    "answer_nll": "answer NLL (nats)",
    "layers": "adapter layers",
    "lora": "LoRA",
    "scaleot": "ScaleOT",
    "gradot": "GradOT",
    "crash": "CRaSh",
}
MARKERS = "os^DvP*X"


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the file's name."""
    figure.savefig(path, format="png", metadata={"Software": None})


def svg(figure: Figure) -> str:
    """Render a figure as an SVG element."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    element = "<svg" + text.getvalue().partition("<svg")[2]  # without XML's declaration, which HTML has no place for
    return re.sub(r"\s*<metadata>.*?</metadata>", "", element, flags=re.DOTALL)


def measurements(tasks: Mapping[str, Measured]) -> Figure:
    """Draw the measurements of every task with their standard errors, in the metrics that it is judged by."""
    rows = {task: by_row(measured) for task, measured in tasks.items()}
    figure = Figure(figsize=(4.4 * len(tasks) + 1, 2 * (0.34 * max(map(len, rows.values())) + 0.9)))
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, (task, measured) in enumerate(tasks.items()):
        metrics = judged_by(measured)
        for axis in axes[len(metrics) :, column]:
            axis.axis("off")
        for axis, metric in zip(axes[:, column], metrics, strict=False):
            names = []
            for height, (name, figures) in enumerate(rows[task].items()):
                measurement, _, adapters = name.partition(", ")
                colour, words = MEASUREMENTS[measurement]
                names.append(f"{words}, {WORDS[adapters]}" if adapters else words)
                error = figures[f"{metric}_stderr"]
                axis.errorbar(figures[metric], height, xerr=error, fmt="o", color=colour, capsize=3)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.grid(axis="x", color="#e4e7eb", linewidth=0.6)
            axis.set_xlabel("← better" if metric in measured["lower_is_better"] else "better →")
            axis.set_title(f"{task}: {WORDS.get(metric, metric)}")
    return figure


def layers(scores: Mapping[str, Any]) -> Figure:
    """Draw which layer became what, and over it, where there are any, its scores.

    `scores` has `kinds` and, for a method that needs them, `prior` and `scores`.
    """
    scored = any(scores["scores"])
    figure = Figure(figsize=(8.4, 3.6 if scored else 1.3))
    *upper, strip = figure.subplots(1 + scored, 1, sharex=True, squeeze=False, height_ratios=[7] * scored + [1])[:, 0]
    for kind, (colour, words) in LAYER_KINDS.items():
        indices = [i for i, other in enumerate(scores["kinds"]) if other == kind]
        if indices:
            strip.bar(indices, 1, width=0.92, color=colour, label=words)
            for axis in upper:
                axis.bar(indices, [scores["scores"][i] for i in indices], width=0.7, color=colour)
    for axis in upper:
        axis.plot(scores["prior"], "k.", markersize=4, label="score at the start")
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_ylabel("importance score")
    strip.set_yticks([])
    strip.set_xlim(-0.6, len(scores["kinds"]) - 0.4)
    strip.spines[:].set_visible(False)
    strip.set_xlabel("decoder layer")
    strip.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("Which layer became what" + ", and its importance score" * scored, fontsize=10)
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw the loss of every step, one panel per stage."""
    columns = min(3, len(histories))
    count = math.ceil(len(histories) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * count))
    axes = figure.subplots(count, columns, squeeze=False)
    for axis in axes.flat[len(histories) :]:
        axis.axis("off")
    for axis, (stage, history) in zip(axes.flat, histories.items(), strict=False):
        axis.plot([row["step"] for row in history], [row["loss"] for row in history], linewidth=0.9)
        axis.set(title=f"loss: {stage}", xlabel="step")
    return figure


@dataclass(frozen=True)
class Panel:
    """One panel of a frontier: the names of a point's figures, of which `x ±` and `y ±` are the errors, and texts."""

    x: str
    y: str
    title: str
    y_label: str
    x_label: str = "recovery in answer NLL: share of full fine-tuning's gain (better →)"


REMAINING_GAP = Panel(
    "recovery answer_nll",
    "remaining gap",
    "Remaining gap after the restoration attack (nats)",
    "attacker's log-perplexity above the model's (better ↑)",
)
GAP_NLL = Panel(
    "recovery answer_nll", "gap answer_nll", "Gap in answer NLL (nats)", "plug-in minus tuned emulator (better ↑)"
)
GAP_ACCURACY = Panel(
    "recovery acc", "gap acc", "Gap in accuracy", GAP_NLL.y_label, GAP_NLL.x_label.replace("answer NLL", "accuracy")
)


def by_line(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group a frontier's rows by their `line` in words, in order; a numeric `label` is the label of its point."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = f"{row['label']:g}" if isinstance(row["label"], int | float) else ""
        name = ", ".join(WORDS.get(part, part) for part in row["line"].split(", "))
        lines.setdefault(name, []).append({**row, "label": label})
    return lines


def line_of(beta: float) -> str:
    """Name the line that one β makes along α."""
    return f"β = {beta:g}, over α"


def by_beta(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group a frontier's rows into one line per β, along α."""
    dial = sorted(rows, key=lambda row: row["beta"])
    return by_line([{**row, "line": line_of(row["beta"]), "label": row["alpha"]} for row in dial])


def frontier(lines: Mapping[str, Sequence[Mapping[str, Any]]], panels: Sequence[Panel]) -> Figure:
    """Draw privacy against utility, one line per name of `lines`; a row has its panels' figures and a `label`.

    The ends of a line are labelled, and a legend names the lines; where no row has a label, the lines' ends are named.
    A row with `hollow` has a hollow marker. A row is left out where a figure is undefined (None or NaN).
    """
    figure = Figure(figsize=(5.4 * len(panels), 4.8))
    axes = figure.subplots(1, len(panels), squeeze=False)
    handles, labelled = {}, any(row["label"] for rows in lines.values() for row in rows)
    labels: list[list[Label]] = [[] for _ in panels]
    for axis, panel, texts in zip(axes.flat, panels, labels, strict=True):
        for k, (name, rows) in enumerate(lines.items()):
            colour, marker = f"C{k}", MARKERS[k % len(MARKERS)]
            points = [row for row in rows if _defined(row[panel.x]) and _defined(row[panel.y])]
            x, y = ([point[column] for point in points] for column in (panel.x, panel.y))
            x_errors, y_errors = ([point.get(f"{column} ±") or 0 for point in points] for column in (panel.x, panel.y))
            bars = axis.errorbar(x, y, y_errors, x_errors, color=colour, marker=marker, elinewidth=0.7)
            hollow = [k for k, point in enumerate(points) if point.get("hollow")]
            axis.plot(
                *([v[k] for k in hollow] for v in (x, y)), marker, color=colour, markerfacecolor="white", zorder=3
            )
            ends = [*zip(points, x, y, strict=True)][:: max(1, len(points) - 1)]
            if labelled:
                handles[name] = bars
                texts += [Label(point["label"], at, height, colour) for point, at, height in ends]
            else:
                texts += [Label(name, at, height, colour) for _, at, height in ends[-1:]]
        axis.axhline(0, color="black", linewidth=0.6)
        axis.margins(x=0.1)
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=3)
    for axis, texts in zip(axes.flat, labels, strict=True):
        write_labels(figure, axis, texts)
    return figure


def over_tokens(
    lines: Mapping[str, Sequence[Mapping[str, float]]], column: str, title: str, *, yscale: str = "linear"
) -> Figure:
    """Draw a column over the tokens that attackers have trained on, one line per name; a row has it and `tokens`."""
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    for k, rows in enumerate(lines.values()):
        axis.plot([row["tokens"] for row in rows], [row[column] for row in rows], marker=MARKERS[k % len(MARKERS)])
    if yscale == "linear":
        axis.axhline(0, color="black", linewidth=0.6)
    axis.margins(x=0.25)
    axis.set(title=title, xlabel="tokens that the attacker has trained on", yscale=yscale)
    if all(row["tokens"] for rows in lines.values() for row in rows):
        axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(EngFormatter(places=0))
    ends = [Label(name, rows[-1]["tokens"], rows[-1][column], f"C{k}") for k, (name, rows) in enumerate(lines.items())]
    write_labels(figure, axis, ends)
    return figure


def _defined(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
