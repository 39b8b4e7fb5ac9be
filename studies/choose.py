"""Choose: which setting to ship, by utility and by the log-perplexity gap that remains after the restoration attack.

`make choose RECOVERY=0.9` (the plug-in's share of full fine-tuning's gain, at least), `LACKS=0.9` (remaining gap in
nats, at least) or `BYTES=0.6` (of the model's, at most), or several of them. Every setting in choose.yaml is run with
one seed; the best one and its neighbours on the frontier are then confirmed with three, until the best of all is one of
these. Every run is a DVC experiment whose figures are kept in choose-runs.csv; interrupted, the same command goes on.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_file, write_csv
from scaleot_core.common.progress import console, say
from scaleot_core.params import load_params
from scaleot_core.reporting import figures
from studies.columns import by_kind, choice_columns
from studies.experiments import Figures, Run, cached_figures, experiment_name, parse_overrides
from studies.frontier import Needs, Setting, frontier, neighbours
from studies.keys import ATTACK, Changes
from studies.means import Means, seed_means, spread

SETTINGS, OUT = Path(__file__).with_suffix(".yaml"), Path("docs/studies")
SHOWN = ("recovery", "remaining gap", "bytes", "exact")
PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}
UNSURE = 0.25  # standard error of a recovery above which settings can't be told apart

Point = tuple[str, float]
"""A line of choose.yaml and a value on it."""


def parse(arguments: Sequence[str]) -> tuple[Needs, Changes]:
    """Read what has to hold, such as RECOVERY=0.9, and changes to params.yaml; UserError for anything else."""
    names = {field.name.upper(): field.name for field in fields(Needs)}
    changes = parse_overrides(arguments)
    needs = {names[key]: changes.pop(key) for key in list(changes) if key in names}
    if not needs:
        raise UserError("choose: say what has to hold, as in `make choose RECOVERY=0.9`, LACKS=0.9 or BYTES=0.6")
    for name, value in needs.items():
        most = 1 if name == "bytes" else 1000
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise UserError(f"{name.upper()} = {value!r}: a number above 0, at most {most}, is needed")
    return Needs(**needs), changes


class Search:
    """Run settings, each seed once, and collect their figures."""

    def __init__(self, plan: Mapping[str, Any], changes: Changes) -> None:
        """Take choose.yaml and the user's own changes; UserError for a change that the search makes itself."""
        searched = {key for spec in plan["lines"].values() for key in (*spec["changes"], spec["over"])}
        if clashing := sorted(changes.keys() & {*searched, "seed"}):
            raise UserError(f"choose: {clashing[0]} is what is searched; edit {SETTINGS.name} instead")
        self.lines, self.user_changes = plan["lines"], changes
        self.changes = {**plan["changes"], **changes}
        self.all_seeds = range(load_params().seed, load_params().seed + plan["seeds"])
        self.runs: dict[Point, list[Figures]] = {}

    def changes_of(self, point: Point) -> dict[str, Any]:
        """Return what a point changes beside what all have."""
        line, value = point
        return {**self.lines[line]["changes"], self.lines[line]["over"]: value}

    def run(self, points: Iterable[Point], seeds: Sequence[int]) -> None:
        """Run points with these seeds; UserError where a task can't tell settings apart."""

        def name(point: Point, seed: int) -> str:
            parts = (f"{key} {value}" for key, value in self.user_changes.items())
            return experiment_name("choose", *point, "seed", seed, *parts)

        def measure(name: str, run: Run) -> Figures:
            metrics, attack, kinds = run.metrics, run.read("attack.json"), experiments[name]["adapters"]
            columns = by_kind(lambda kind: choice_columns(metrics, attack, kind), kinds)
            for kind in kinds:
                check_task(seed_means([columns], kind))  # before the hours that the others take
                say(f"{name}, {kind}: {described(seed_means([columns], kind))}")
            return columns

        points = list(points)
        experiments = {
            name(point, seed): {**self.changes, **self.changes_of(point), "seed": seed}
            for point in points
            for seed in seeds
        }
        rows = cached_figures(OUT / "choose-runs.csv", experiments, measure, "choose", ATTACK)
        for point in points:
            self.runs[point] = [rows[name(point, seed)] for seed in seeds]

    def settings(self) -> list[Setting]:
        """Return the settings that were run, one for each kind of adapters."""
        settings = []
        for (line, value), rows in self.runs.items():
            changes = self.changes_of((line, value))
            for kind in changes["adapters"]:
                settings.append(Setting(line, value, kind, changes, len(rows), seed_means(rows, kind)))
        return settings

    def recommend(self, needs: Needs) -> list[Setting]:
        """Return the best setting, then its neighbours on the frontier, all confirmed with all seeds."""
        while True:
            settings = self.settings()
            best = needs.best(settings)
            reported = [best, *neighbours(settings, best)]
            pending = [setting for setting in reported if setting.seeds < len(self.all_seeds)]
            if best in pending:
                pending = [best]  # its neighbours count only if it stays the best
            if not pending:
                return reported
            self.run(dict.fromkeys((setting.line, setting.value) for setting in pending), self.all_seeds)


def described(means: Means) -> str:
    """Say a setting's figures in a line."""

    def figure(column: str, unit: str = "") -> str:
        mean, error = means[column] or (math.nan, None)
        return f"{mean:.2f}{'' if error is None else f' ± {error:.2f}'}{unit}"

    return (
        f"recovery {figure('recovery')}, remaining gap {figure('remaining gap', ' nats')}, "
        f"{figure('bytes')} of the model's bytes, {figure('exact')} exact"
    )


def as_changes(setting: Setting) -> list[str]:
    """Write a setting as `-S` and SET= take it."""
    changes = {**setting.changes, "adapters": f"[{setting.adapters}]"}
    return [f"{key}={value}" for key, value in changes.items()]


def check_task(means: Means) -> None:
    """Raise UserError where the evaluated questions leave a recovery too uncertain to tell settings apart by it."""
    if means["recovery"] is None:
        raise UserError("choose: full fine-tuning gains nothing on one of `tasks`, so there is no utility to choose by")
    if (error := means["recovery error"]) and error[0] > UNSURE:
        raise UserError(
            f"choose: a recovery is known only to within ± {error[0]:.2f}, too uncertain to compare settings (the "
            f"limit is {UNSURE}); raise data.eval_questions, or take another task"
        )


def main() -> None:
    needs, changes = parse(sys.argv[1:])
    search = Search(yaml.safe_load(SETTINGS.read_text(encoding="utf-8")), changes)
    points = [(line, value) for line, spec in search.lines.items() for value in spec["values"]]
    search.run(points, search.all_seeds[:1])
    reported = search.recommend(needs)
    write(search.settings())
    report(search, needs, reported)


def write(settings: Sequence[Setting]) -> None:
    """Write all settings as CSV, and draw them."""
    rows = [
        {
            "line": f"{setting.line}, {setting.adapters}",
            "label": setting.value,
            "adapters": setting.adapters,
            "changes": " ".join(as_changes(setting)),
            "seeds": setting.seeds,
            **spread(setting.means),
        }
        for setting in settings
    ]
    write_csv(OUT / "choose.csv", rows)
    points = [
        {**row, "recovery answer_nll": row["recovery"], "gap answer_nll": row["gap"], "gap answer_nll ±": row["gap ±"]}
        for row in rows
    ]
    panels = [figures.REMAINING_GAP, figures.GAP_NLL]
    with atomic_file(OUT / "choose.png") as temporary:
        figures.save_png(figures.frontier(figures.by_line(points), panels), temporary)


def report(search: Search, needs: Needs, reported: Sequence[Setting]) -> None:
    """Print the frontier and the reported settings, the recommended one first."""
    table = Table("", "recovery", "remaining gap, nats", "bytes", "exact", "seeds", title="the frontier")
    for setting in frontier(search.settings()):
        title = Text(f"{setting.line}, {setting.adapters}, {setting.value}")
        table.add_row(title, *(f"{setting.figure(column):.2f}" for column in SHOWN), str(setting.seeds))
    console.print(table)
    console.print(f"all settings: {OUT}/choose.csv", **PLAIN)
    for role, setting in zip(("recommended", "neighbour", "neighbour"), reported, strict=False):
        console.print(f"{role}: {' '.join(as_changes(setting))}", style="bold", **PLAIN)
        console.print(f"  {described(setting.means)}", **PLAIN)
    for name, miss in needs.misses(reported[0]).items():
        console.print(f"no setting here meets {name.upper()}: the nearest misses it by {miss:.2f}", style="yellow")
    changes = [*as_changes(reported[0]), *(f"{key}={value}" for key, value in search.user_changes.items())]
    console.print(f"try it: dvc exp run {' '.join(f'-S {change!r}' for change in changes)}", **PLAIN)


if __name__ == "__main__":
    run_command(main)
