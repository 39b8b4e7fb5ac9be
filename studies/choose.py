"""Choose: which setting to ship, by utility and by the log-perplexity gap that remains after the restoration attack.

`make choose RECOVERY=0.9` (the plug-in's share of full fine-tuning's gain, at least), `LACKS=0.9` (remaining gap in
nats, at least) or `BYTES=0.6` (of the model's, at most), or several of them. Each line of choose.yaml is searched with
one seed; where only one of two neighbouring settings meets the needs, the setting between them is run too. The best
setting and its neighbours on the frontier then get three seeds; what these change of one setting is expected of those
that have one seed alone, so that few are confirmed in vain. Every run is a DVC experiment whose figures are kept in
choose-runs.csv; the same command goes on where it was stopped.
"""

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from scaleot_core.params import changed, load_params
from scaleot_core.reporting import figures
from scaleot_core.reporting.measurements import judged_by, mean, of_kind, over_seeds
from studies.attacks import TARGETS, remaining_gap
from studies.experiments import (
    Changes,
    Figures,
    cached_figures,
    experiment_name,
    parse_overrides,
    read_metrics,
    run_all,
    workers,
)
from studies.frontier import Needs, Row, between, frontier, known, neighbours

SETTINGS, OUT = Path(__file__).with_suffix(".yaml"), Path("docs/studies")
COLUMNS = ("recovery", "recovery error", "gap", "remaining gap", "bytes", "exact")
PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}
CHEAP_SCORES: Changes = {  # makes scores and harmonizers in seconds
    "layer_importance.estimator": "block_influence",
    "layer_importance.calibration_blocks": 1,
    "layer_importance.steps": 0,
    "layer_importance.sensitivity_blocks": 1,
    "dlr.steps": 0,
}
UNSURE = 0.25  # standard error of a recovery above which settings can't be told apart


def parse(arguments: Sequence[str]) -> tuple[Needs, Changes]:
    """Read what has to hold, such as RECOVERY=0.9, and changes to params.yaml; UserError for anything else."""
    names = {field.name.upper(): field.name for field in fields(Needs)}
    given = parse_overrides(arguments)
    asked = {names[key]: given.pop(key) for key in list(given) if key in names}
    if not asked:
        raise UserError("choose: say what has to hold, as in `make choose RECOVERY=0.9`, LACKS=0.9 or BYTES=0.6")
    for name, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= (1e3, 1)[name == "bytes"]:
            raise UserError(
                f"{name.upper()} = {value!r}: a number above 0 is needed{', at most 1' * (name == 'bytes')}"
            )
    return Needs(**asked), given


def spared(changes: Changes) -> Changes:
    """Make scores and harmonizers cheap where no figure hangs on them: no layer is replaced, and none shipped whole."""
    params = changed(load_params(), dict(changes))
    unused = params.method == "scaleot" and not (params.alpha or params.adapter_layers or params.max_bytes_ratio)
    return {**CHEAP_SCORES, **changes} if unused else changes


def run_figures(metrics: Mapping[str, Any], attack: Mapping[str, Any], kind: str) -> dict[str, float | None]:
    """Read one run's utility with a kind of adapters, in each task's least noisy metric, and what the attacker lacks.

    `recovery error` is the plug-in's standard error over full fine-tuning's gain.
    """
    tasks = of_kind(metrics, kind)["tasks"].values()
    recoveries, gaps, errors = [], [], []
    for task in tasks:
        metric = judged_by(task)[-1]
        gain = abs(task["full_finetune"][metric] - task["zero_shot"][metric])
        error = task["plug_in"].get(f"{metric}_stderr", 0.0)
        errors.append(error / gain if gain else math.inf)
        recoveries.append(task["recovery"][metric])
        gaps.append(task["gap"][metric])
    return {
        "recovery": mean(recoveries),
        "recovery error": math.hypot(*errors) / len(errors),
        "gap": mean(gaps),
        "remaining gap": remaining_gap(metrics, attack),
        "bytes": metrics["emulator"]["share_of_model"],
        "exact": attack["weights"]["exact"],
    }


class Search:
    """Run settings, each once, and collect their figures."""

    def __init__(self, plan: Mapping[str, Any], changes: Changes) -> None:
        """Take choose.yaml and the user's own changes; UserError for a change that the search makes itself."""
        own = {key for spec in plan["lines"].values() for key in (*spec["changes"], spec["over"])}
        if taken := sorted(changes.keys() & {*own, "seed"}):
            raise UserError(f"choose: {taken[0]} is what is searched; edit {SETTINGS.name} instead")
        self.plan, self.seed, self.given = plan, load_params().seed, changes
        self.changes = {**plan["changes"], **changes}
        self.rows: list[Row] = []

    def name(self, *parts: object) -> str:
        """Name an experiment; those with other changes of the user's have other names."""
        return experiment_name("choose", *parts, *(f"{key} {value}" for key, value in self.given.items()))

    def figures(self, wanted: Mapping[str, Changes]) -> dict[str, dict[str, dict[str, float | None]]]:
        """Run experiments by name; return their figures by name and kind of adapters."""
        kinds = {name: changes["adapters"] for name, changes in wanted.items()}
        wanted = {name: spared(changes) for name, changes in wanted.items()}
        columns = [f"{column}, {kind}" for kind in ("layers", "lora") for column in COLUMNS]

        def make(missing: Mapping[str, Changes]) -> Iterator[tuple[str, Figures]]:
            for name, run in run_all(missing, "choose", TARGETS):
                metrics, attack = read_metrics(run), read_metrics(run, "attack.json")
                found: dict[str, float | None] = dict.fromkeys(columns)
                for kind in kinds[name]:
                    figures_of = run_figures(metrics, attack, kind)
                    found |= {f"{column}, {kind}": value for column, value in figures_of.items()}
                    say(f"{name}, {kind}: {described(figures_of)}")
                yield name, found

        found = cached_figures(OUT / "choose-runs.csv", columns, wanted, make, *TARGETS)
        return {
            name: {kind: {column: own[f"{column}, {kind}"] for column in COLUMNS} for kind in kinds[name]}
            for name, own in found.items()
        }

    def run(self, points: Sequence[tuple[str, float]], confirmed: Sequence[Row] = ()) -> None:
        """Run settings, each a line and a value on it, with one seed; beside them, confirm others, so no core waits."""
        settings = {}
        for line, value in points:
            spec = self.plan["lines"][line]
            settings[self.name(line, value)] = (line, value, {**spec["changes"], spec["over"]: value})
        wanted = {name: {**self.changes, **own, "seed": self.seed} for name, (_, _, own) in settings.items()}
        found = self.figures({**wanted, **self.seeds(self.unconfirmed(confirmed))})
        for name, (line, value, changes) in settings.items():
            for kind, measured in found[name].items():
                row = {"line": f"{line}, {kind}", "label": value, "adapters": kind, "changes": changes, **measured}
                self.rows.append(row | dict.fromkeys(f"{column} ±" for column in COLUMNS))
        self.confirm(confirmed)

    def halfway(self, needs: Needs) -> list[tuple[str, float]]:
        """Give the points between neighbours in choose.yaml of which only one is expected to meet the needs.

        Those that were run already are left out.
        """
        found: dict[tuple[str, float], None] = {}
        expected = self.expected()
        for line, spec in self.plan["lines"].items():
            for kind in spec["changes"]["adapters"]:
                own = {row["label"]: not needs.misses(row) for row in expected if row["line"] == f"{line}, {kind}"}
                planned = [value for value in spec["values"] if value in own]
                values = between(planned, [own[value] for value in planned])
                found |= dict.fromkeys((line, value) for value in values if value not in own)
        return list(found)

    def expected(self) -> list[Row]:
        """Give every setting as all seeds would show it: one that has only the first is moved as the others were.

        Questions, text and full fine-tuning are a seed's own and common to all settings, so that what the first seed
        shows too high of one it shows too high of all.
        """
        seen = [(row["first"], row) for row in self.rows if "first" in row]
        rows = [dict(row) for row in self.rows]
        for column in ("recovery", "remaining gap"):
            moves = [
                after[column] - first[column] for first, after in seen if None not in (first[column], after[column])
            ]
            for row in rows:
                if moves and "first" not in row and row[column] is not None:
                    row[column] += statistics.fmean(moves)
        return rows

    def recommended(self, needs: Needs) -> list[Row]:
        """Give the best setting, then its neighbours on the frontier, all with all seeds."""
        while True:
            chosen = self.best(needs)
            reported = [chosen, *self.beside(chosen)]
            if self.best(needs) is chosen:  # no neighbour turned out better
                return reported

    def best(self, needs: Needs) -> Row:
        """Choose the setting that is still the best one once it has all seeds."""
        while True:
            expected = self.expected()
            row = self.rows[expected.index(needs.best(expected))]
            if not self.unconfirmed([row]):
                return row
            self.confirm([row])

    def beside(self, chosen: Row) -> list[Row]:
        """Give the chosen setting's neighbours on the frontier, with all seeds."""
        while True:
            expected = self.expected()
            there = neighbours(expected, expected[self.rows.index(chosen)])
            found = [self.rows[expected.index(row)] for row in there]
            if not self.unconfirmed(found):
                return found
            self.confirm(found)

    def unconfirmed(self, rows: Sequence[Row]) -> list[Row]:
        """Give those rows that have one seed of several."""
        return [row for row in rows if "first" not in row and self.plan["seeds"] > 1]

    def seeds(self, rows: Sequence[Row]) -> dict[str, Changes]:
        """Give the experiments of settings with every seed, by name."""
        wanted: dict[str, Changes] = {}
        for row in rows:
            changes = {**row["changes"], "adapters": [row["adapters"]]}
            parts = [f"{key} {value}" for key, value in changes.items()]
            for seed in range(self.seed, self.seed + self.plan["seeds"]):
                wanted[self.name(*parts, "seed", seed)] = {**self.changes, **changes, "seed": seed}
        return wanted

    def confirm(self, rows: Sequence[Row]) -> None:
        """Give rows the mean over all seeds and its standard error, in place; `first` keeps what they had."""
        rows = self.unconfirmed(rows)
        found = self.figures(self.seeds(rows))
        for row in rows:
            row["first"] = {column: row[column] for column in COLUMNS}
            runs = [found[name][row["adapters"]] for name in self.seeds([row])]
            for column in COLUMNS:
                row[column], row[f"{column} ±"] = over_seeds([each[column] for each in runs]) or (None, None)


def described(row: Mapping[str, Any]) -> str:
    """Say a setting's figures in a line."""

    def figure(name: str, unit: str = "") -> str:
        error = row.get(f"{name} ±")
        return "–" if row[name] is None else f"{row[name]:.2f}{'' if error is None else f' ± {error:.2f}'}{unit}"

    return (
        f"recovery {figure('recovery')}, remaining gap {figure('remaining gap', ' nats')}, "
        f"{figure('bytes')} of the model's bytes, {figure('exact')} exact"
    )


def as_settings(row: Row) -> str:
    """Write a setting as `-S` and SET= take it."""
    changes = {**row["changes"], "adapters": f"[{row['adapters']}]"}
    return " ".join(f"{key}={value}" for key, value in changes.items())


def check_task(row: Row) -> None:
    """Raise UserError where the evaluated questions leave a recovery too uncertain to tell settings apart by it."""
    if row["recovery"] is None:
        raise UserError("choose: full fine-tuning gains nothing on one of `tasks`, so there is no utility to choose by")
    if row["recovery error"] > UNSURE:
        raise UserError(
            f"choose: a recovery is known only to within ± {row['recovery error']:.2f}, too uncertain to compare "
            f"settings (the limit is {UNSURE}); raise data.eval_questions, or take another task"
        )


def main() -> None:
    needs, changes = parse(sys.argv[1:])
    search = Search(yaml.safe_load(SETTINGS.read_text(encoding="utf-8")), changes)
    points = [(line, value) for line, spec in search.plan["lines"].items() for value in spec["values"]]
    at_once = workers()
    search.run(points[:at_once])
    check_task(search.rows[0])  # before the hours that the others take
    points = points[at_once:]
    whole = len(points) - len(points) % at_once  # the others run beside what comes next, so that no core waits
    search.run(points[:whole])
    search.run([*points[whole:], *search.halfway(needs)], confirmed=[needs.best(search.rows)])
    search.run(search.halfway(needs))  # where those points, or the other seeds, change who meets them
    report(search, needs, search.recommended(needs))


def report(search: Search, needs: Needs, reported: Sequence[Row]) -> None:
    """Write all settings, draw them, and print the frontier and the reported ones, the recommended one first."""
    rows, expected = search.rows, search.expected()
    write_csv(OUT / "choose.csv", [{**row, "changes": as_settings(row)} for row in rows], [*_columns()])
    drawn = [
        {**row, "recovery answer_nll": row["recovery"], "gap answer_nll": row["gap"], "gap answer_nll ±": row["gap ±"]}
        for row in sorted(expected, key=lambda row: row["label"])
    ]
    panels = [figures.REMAINING_GAP, figures.GAP_NLL]
    with atomic_file(OUT / "choose.png") as temporary:
        figures.save_png(figures.frontier(figures.by_line(drawn), panels), temporary)
    columns = ("recovery", "remaining gap", "bytes", "exact")
    table = Table(
        "", "recovery", "remaining gap, nats", "bytes", "exact", "seeds", title="as all seeds would show them"
    )
    for row in frontier(expected):
        seeds = search.plan["seeds"] if "first" in row else 1
        table.add_row(
            Text(f"{row['line']}, {row['label']}"), *(f"{known(row[name]):.2f}" for name in columns), str(seeds)
        )
    console.print(table)
    console.print(f"all settings as measured: {OUT}/choose.csv", **PLAIN)
    for title, row in zip(("recommended", "neighbour", "neighbour"), reported, strict=False):
        console.print(f"{title}: {as_settings(row)}", style="bold", **PLAIN)
        console.print(f"  {described(row)}", **PLAIN)
    for name, miss in needs.misses(reported[0]).items():
        console.print(f"no setting here meets {name.upper()}: the nearest misses it by {miss:.2f}", style="yellow")
    given = [f"{key}={value}" for key, value in search.given.items()]
    tried = " ".join(f"-S {part!r}" for part in [*as_settings(reported[0]).split(), *given])
    console.print(f"try it: dvc exp run {tried}", **PLAIN)


def _columns() -> Iterator[str]:
    yield from ("line", "label", "adapters", "changes")
    for column in COLUMNS:
        yield from (column, f"{column} ±")


if __name__ == "__main__":
    run_command(main)
