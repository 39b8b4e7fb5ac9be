"""The report: what was measured on one HTML page that needs nothing else, no network, no script."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from scaleot_core import pictures
from scaleot_core.files import whole_file
from scaleot_core.report import MEASUREMENTS

Row = Mapping[str, Any]
TITLES = {"acc": "accuracy", "answer_nll": "answer nll (nats)"}  # metrics that a frontier is drawn in


@dataclass(frozen=True)
class Section:
    """A part of the page. `tables` are rows of cells, the first of them the header."""

    title: str
    text: str = ""
    picture: str = ""
    tables: list[list[list[str]]] = field(default_factory=list)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "–" if value is None or value == "" else f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Iterable[Row]) -> list[list[str]]:
    """Rows of one shape as cells under their names."""
    rows = list(rows)
    return [list(rows[0]), *([_number(value) for value in row.values()] for row in rows)] if rows else []


def _measurements(tasks: Mapping[str, Any]) -> Section:
    tables = []
    for task, measured in tasks.items():
        header = [task, *measured["metrics"]]
        cells = [
            [name, *(f"{measured[name][m]:.3f} ± {measured[name][f'{m}_stderr']:.3f}" for m in measured["metrics"])]
            for name in MEASUREMENTS
        ]
        for name in ("gap", "recovery"):
            cells.append([name, *(_number(measured[name][metric]) for metric in measured["metrics"])])
        tables.append([header, *cells])
    text = "Gap is plug-in minus tuned emulator, recovery the plug-in's share of what full fine-tuning gains."
    return Section("The five measurements", text, pictures.svg(pictures.measurements(tasks)), tables)


def _frontier(title: str, text: str, lines: Mapping[str, Sequence[Row]]) -> Section:
    return Section(title, text, pictures.svg(pictures.frontier(lines, TITLES)))


def sections(
    metrics: Mapping[str, Any],
    layers: Mapping[str, Any],
    histories: Mapping[str, Sequence[Row]],
    *,
    sweep: Sequence[Row] = (),
    compared: Sequence[Row] = (),
) -> list[Section]:
    """The page's parts. `sweep` and `compared` are the tables of `make sweep` and `make compare`, if there are any."""
    found = []
    if compared:
        lines = {row["method"]: [{**_renamed(row), "label": ""}] for row in compared}
        text = "Each method at the same bytes, mean over tasks and seeds. Up and to the right is better."
        found.append(_frontier("Methods", text, lines))
    if sweep:
        betas = sorted({row["beta"] for row in sweep})
        lines = {
            f"β = {beta:g}": [{**row, "label": f"{row['alpha']:g}"} for row in sweep if row["beta"] == beta]
            for beta in betas
        }
        text = "ScaleOT over α, the number beside a point, and β. Up and to the right is better."
        found.append(_frontier("The dial", text, lines))
    found.append(_measurements(metrics["tasks"]))
    kinds = list(zip(*(layers[name] for name in ("prior", "scores", "kinds")), strict=True))
    rows = [{"layer": i, "prior": p, "score": s, "became": kind} for i, (p, s, kind) in enumerate(kinds)]
    found.append(
        Section(
            "Layers",
            "Scores over depth, and what became of each layer.",
            pictures.svg(pictures.layers(layers)),
            [table(rows)],
        )
    )
    found.append(Section("Losses", "Of every stage that trains.", pictures.svg(pictures.curves(histories))))
    costs = [{"stage": stage, **cost} for stage, cost in metrics["cost"].items()]
    names = list(dict.fromkeys(name for cost in costs for name in cost))
    found.append(Section("Costs", tables=[table({name: cost.get(name) for name in names} for cost in costs)]))
    return found


def _renamed(row: Row) -> dict[str, Any]:
    """A row of the comparison under the sweep's names of its metrics."""
    return {
        f"{figure} {metric}{error}": row[f"{figure} {short}{error}"] if row[f"{figure} {short}{error}"] != "" else None
        for figure in ("recovery", "gap")
        for metric, short in (("acc", "acc"), ("answer_nll", "nll"))
        for error in ("", " ±")
    }


def write(path: Path, title: str, summary: Mapping[str, Any], parts: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=select_autoescape(("jinja",)), trim_blocks=True)
    text = environment.get_template("page.html.jinja").render(title=title, summary=summary, sections=parts)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
