"""Pictures: draw all pictures of docs/ anew from what git has, metrics.json and docs/studies/*.csv.

`make pictures` runs it. What became of each layer isn't in git: it is drawn where a run's plots/ are.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_file, read_csv, read_json
from scaleot_core.common.progress import say
from scaleot_core.reporting import figures

DOCS, LAYERS = Path("docs"), Path("plots/layers.csv")
PANELS = [figures.REMAINING_GAP, figures.GAP_NLL]
CHANNELS = {"scaleot, channels": "channel pruning", "scaleot, fewer channels": "channel pruning, 60 % of the bytes"}


def rows_of(study: str) -> list[dict[str, Any]]:
    """Read a study's figures; an empty cell is None."""
    rows = read_csv(DOCS / "studies" / f"{study}.csv")
    return [{name: None if value == "" else value for name, value in row.items()} for row in rows]


def choose() -> Figure:
    """Draw what `make choose` searched."""
    names = {f"{name}{error}": f"{name} answer_nll{error}" for name in ("recovery", "gap") for error in ("", " ±")}
    rows = [{**row, **{name: row[column] for column, name in names.items()}} for row in rows_of("choose")]
    return figures.frontier(figures.by_line(sorted(rows, key=lambda row: row["label"])), PANELS)


def methods() -> Figure:
    """Draw each method's recovery in the comparison against the remaining gap of its package in private.csv.

    The attack on a package doesn't depend on how the package is tuned.
    """
    compared = {row["method"]: row for row in rows_of("compare")}
    rows = []
    for attacked in rows_of("private"):
        method = attacked["line"].removesuffix(", lora")
        for name in (method, f"{method}, lora"):
            recovery = {f"recovery answer_nll{error}": compared[name][f"recovery nll{error}"] for error in ("", " ±")}
            line = {"line": CHANNELS.get(method, method), "label": None, "hollow": name == method}
            rows.append({**line, **recovery, "remaining gap": attacked["remaining gap"]})
    panel = figures.REMAINING_GAP
    title = f"{panel.title};\nhollow: the method's own adapter layers, filled: LoRA"
    return figures.frontier(figures.by_line(rows), [dataclasses.replace(panel, title=title)])


def budgets() -> Figure:
    """Draw the remaining gap over the attacker's tokens, a name a setting, a line a package."""
    lines: dict[str, list[dict[str, float]]] = {}
    package = None
    for row in rows_of("budgets"):
        name = f"channels, {row['channels']:g}" if row["channels"] else f"α {row['alpha']:g}, β {row['beta']:g}"
        points = lines.setdefault(name, [])
        if points and row["package"] != package:
            points.append({"tokens": math.nan, "remaining gap": math.nan})  # ends the line
        package = row["package"]
        points.append({"tokens": row["tokens"], "remaining gap": row["loss"] - row["model loss"]})
    return figures.over_tokens(lines, "remaining gap", "Remaining gap over the attacker's tokens (nats)")


def pictures() -> Iterator[tuple[str, Figure]]:
    """Yield every picture with its name."""
    yield "measurements", figures.measurements(read_json(Path("metrics.json"))["tasks"])
    if LAYERS.exists():
        rows = read_csv(LAYERS)
        columns = (("prior", "prior"), ("scores", "score"), ("kinds", "kind"))
        yield "layers", figures.layers({name: [row[column] for row in rows] for name, column in columns})
    yield "studies/sweep", figures.frontier(figures.by_beta(rows_of("sweep")), [figures.GAP_NLL])
    yield "studies/attacks", figures.frontier(figures.by_line(rows_of("attacks")), PANELS)
    yield "studies/private", figures.frontier(figures.by_line(rows_of("private")), PANELS)
    yield "studies/choose", choose()
    yield "studies/methods", methods()
    yield "studies/budgets", budgets()


def main() -> None:
    for name, figure in pictures():
        with atomic_file(DOCS / f"{name}.png") as temporary:
            figures.save_png(figure, temporary)
        say(f"{DOCS / name}.png")


if __name__ == "__main__":
    run_command(main)
