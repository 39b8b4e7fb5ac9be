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

from scaleot_core.reporting.measurements import Measured, by_row, judged_by

matplotlib.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 120,
        "figure.autolayout": True,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "scaleot",  # the same figures give the same bytes
    }
)
KIND_COLOURS = {
    "adapter": "#d1495b",
    "compressed": "#00798c",
    "harmonizer": "#edae49",
    "shared": "#9aa5b1",
    "removed": "#d8d8d8",
}
MEASUREMENT_COLOURS = {
    "zero_shot": "#9aa5b1",
    "full_finetune": "#3e4c59",
    "emulator_zero_shot": "#edae49",
    "emulator_finetune": "#e07b39",
    "plug_in": "#d1495b",
}
MARKERS = "os^DvP*X"

Row = Mapping[str, Any]


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
    shown = {task: by_row(measured) for task, measured in tasks.items()}
    most = max(map(len, shown.values()))
    figure = Figure(figsize=(4.4 * len(tasks) + 1, 2 * (0.34 * most + 0.9)))
    rows = figure.subplots(2, len(tasks), squeeze=False)
    for column, (task, measured) in enumerate(tasks.items()):
        for axis in rows[len(judged_by(measured)) :, column]:
            axis.axis("off")
        for axis, metric in zip(rows[:, column], judged_by(measured), strict=False):
            for at, (name, figures) in enumerate(shown[task].items()):
                colour = MEASUREMENT_COLOURS[name.partition(",")[0]]
                axis.errorbar(figures[metric], at, xerr=figures[f"{metric}_stderr"], fmt="o", color=colour, capsize=3)
            axis.set_yticks(range(len(shown[task])), list(shown[task]), fontsize=8)
            axis.set_ylim(len(shown[task]) - 0.5, -0.5)
            axis.grid(axis="x", color="#e4e7eb", linewidth=0.6)
            better = "← better" if metric in measured["lower_is_better"] else "better →"
            axis.set_xlabel(f"{metric} ({better})", fontsize=8)
            axis.set_title(task if axis is rows[0, column] else "", fontsize=9)
    return figure


def layers(scores: Mapping[str, Any]) -> Figure:
    """Draw every layer's score over depth, coloured by its kind; `scores` has `prior`, `scores` and `kinds`."""
    figure = Figure(figsize=(8.4, 3.2))
    axis = figure.subplots()
    for kind, colour in KIND_COLOURS.items():
        members = [i for i, k in enumerate(scores["kinds"]) if k == kind]
        if members:
            axis.bar(members, [scores["scores"][i] for i in members], color=colour, label=kind)
    axis.plot(range(len(scores["prior"])), scores["prior"], "k.", markersize=4, label="prior")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("score")
    axis.legend(fontsize=8, ncols=4, frameon=False)
    return figure


def curves(histories: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw the loss of every step, one panel per stage."""
    columns = min(3, len(histories))
    count = math.ceil(len(histories) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * count))
    axes = figure.subplots(count, columns, squeeze=False)
    for axis in axes.flat[len(histories) :]:
        axis.axis("off")
    for axis, (stage, history) in zip(axes.flat, histories.items(), strict=False):
        axis.plot([row["step"] for row in history], [row["loss"] for row in history], linewidth=0.9)
        axis.set_title(stage, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("loss", fontsize=8)
    return figure


@dataclass(frozen=True)
class Panel:
    """What one panel of a frontier shows: names of a point's figures, of which `y ±` is y's error, and its texts."""

    x: str
    y: str
    title: str
    y_label: str
    x_label: str = "recovery: share of full fine-tuning's gain (better →)"


def gap_panel(metric: str, title: str) -> Panel:
    """Make the panel of gap against recovery in one metric."""
    return Panel(f"recovery {metric}", f"gap {metric}", title, "gap: plug-in minus tuned emulator (better ↑)")


GAP_ACCURACY, GAP_NLL = gap_panel("acc", "accuracy"), gap_panel("answer_nll", "answer nll (nats)")
REMAINING_GAP = Panel(
    "recovery answer_nll",
    "remaining gap",
    "after the restoration attack",
    "remaining log-perplexity gap after the attack (nats, better ↑)",
)


def by_line(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Group a frontier's rows by their `line`, in order; a point is labelled with its row's `label`, if any."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = f"{row['label']:g}" if isinstance(row["label"], int | float) else ""
        lines.setdefault(row["line"], []).append({**row, "label": label})
    return lines


def line_of(beta: float) -> str:
    """Name the line that one β makes along α."""
    return f"β = {beta:g}, over α"


def by_beta(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Group a frontier's rows into one line per β, along α."""
    dial = sorted(rows, key=lambda row: row["beta"])
    return by_line([{**row, "line": line_of(row["beta"]), "label": row["alpha"]} for row in dial])


def frontier(lines: Mapping[str, Sequence[Row]], panels: Sequence[Panel]) -> Figure:
    """Draw privacy against utility, one line per name of `lines`; a row has its panels' figures and a `label`.

    A point is left out where a figure is undefined (None or NaN).
    """
    figure = Figure(figsize=(5 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    colours = matplotlib.colormaps["viridis"]
    for axis, panel in zip(axes.flat, panels, strict=True):
        for k, (name, points) in enumerate(lines.items()):
            known = [p for p in points if p[panel.x] not in (None, "") and p[panel.y] not in (None, "")]
            x, y, errors = ([float(p[part] or 0) for p in known] for part in (panel.x, panel.y, f"{panel.y} ±"))
            marker = MARKERS[k % len(MARKERS)]
            axis.errorbar(x, y, errors, color=colours(k / len(lines)), marker=marker, label=name)
            aside = (5, 5) if k % 2 == 0 else (5, -11)  # neighbouring lines' labels on either side
            for point, at, height in zip(known, x, y, strict=True):
                if math.isfinite(at):
                    style = {"textcoords": "offset points", "fontsize": 7, "color": colours(k / len(lines))}
                    axis.annotate(point["label"], (at, height), aside, **style)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xlabel(panel.x_label, fontsize=9)
        axis.set_ylabel(panel.y_label, fontsize=9)
        axis.set_title(panel.title, fontsize=9)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure


def recovered(curves: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw attacks: perplexity over tokens seen, one line per target; a row has `tokens` and `perplexity`."""
    figure = Figure(figsize=(6.4, 3.8))
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot([p["tokens"] for p in points], [p["perplexity"] for p in points], marker="o", label=name)
    axis.set_yscale("log")
    axis.set_xlabel("tokens that the attacker has trained on")
    axis.set_ylabel("corpus perplexity (more is better for the model owner)")
    axis.legend(fontsize=8, frameon=False)
    return figure
