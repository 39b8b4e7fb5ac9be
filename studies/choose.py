"""Choose: which setting to ship, for what has to hold, by utility and by what the restoration attack leaves.

`make choose RECOVERY=0.9` (the plug-in's share of full fine-tuning's gain, at least), `LACKS=0.9` (nats of
log-perplexity that the attacker still lacks, at least) or `BYTES=0.6` (of the model's, at most), or several of them.
The lines of settings in choose.yaml are searched with one seed; where of two neighbours only one has what must hold,
so is the setting between them. The best one and its neighbours on the frontier then get three seeds. Every run is a DVC
experiment, kept in choose-runs.csv; the same command goes on where it was stopped.
"""

import math
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
from scaleot_core.params import load_params
from scaleot_core.reporting import figures
from scaleot_core.reporting.measurements import judged_by, mean, of_kind, over_seeds
from studies.experiments import (
    Changes,
    Figures,
    cached_figures,
    experiment_name,
    parse_overrides,
    read_metrics,
    run_all,
)
from studies.frontier import Needs, Row, between, frontier, known, neighbours

SETTINGS, OUT = Path(__file__).with_suffix(".yaml"), Path("docs/studies")
TARGETS = ("dvc.yaml", "studies/dvc.yaml:attack")
COLUMNS = ("recovery", "recovery error", "gap", "lacking", "bytes", "exact")
PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}
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


def run_figures(metrics: Mapping[str, Any], attack: Mapping[str, Any], kind: str) -> dict[str, float | None]:
    """Read one run's utility with a kind of adapters, in each task's least noisy metric, and what the attacker lacks.

    `recovery error` is the standard error that the evaluated questions leave.
    """
    tasks = of_kind(metrics, kind)["tasks"].values()
    end = attack["restoration"]["package"]["perplexity"]
    errors = []
    for task in tasks:
        metric = judged_by(task)[-1]
        gain = abs(task["full_finetune"][metric] - task["zero_shot"][metric])
        error = task["plug_in"].get(f"{metric}_stderr", 0.0)
        errors.append(error / gain if gain else math.inf)
    return {
        "recovery": mean([task["recovery"][judged_by(task)[-1]] for task in tasks]),
        "recovery error": math.hypot(*errors) / len(errors),
        "gap": mean([task["gap"][judged_by(task)[-1]] for task in tasks]),
        "lacking": math.log(end / metrics["corpus_perplexity"]["model"]),
        "bytes": metrics["emulator"]["share_of_model"],
        "exact": attack["weights"]["exact"],
    }


class Search:
    """Runs settings, each once, and tells them."""

    def __init__(self, plan: Mapping[str, Any], changes: Changes) -> None:
        self.plan, self.seed = plan, load_params().seed
        self.changes = {**plan["changes"], **changes}
        self.rows: list[Row] = []

    def figures(self, wanted: Mapping[str, Changes]) -> dict[str, dict[str, dict[str, float | None]]]:
        """Run experiments by name; return their figures by name and kind of adapters."""
        kinds = {name: changes["adapters"] for name, changes in wanted.items()}
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

    def run(self, points: Sequence[tuple[str, float]]) -> None:
        """Run settings, each a line and a value on it, with one seed."""
        settings = {}
        for line, value in points:
            spec = self.plan["lines"][line]
            settings[experiment_name("choose", line, value)] = (line, value, {**spec["changes"], spec["over"]: value})
        found = self.figures({n: {**self.changes, **own, "seed": self.seed} for n, (_, _, own) in settings.items()})
        for name, (line, value, changes) in settings.items():
            for kind, measured in found[name].items():
                row = {"line": f"{line}, {kind}", "label": value, "adapters": kind, "changes": changes, **measured}
                self.rows.append(row | dict.fromkeys(f"{column} ±" for column in COLUMNS))

    def halfway(self, needs: Needs) -> list[tuple[str, float]]:
        """Give the points between neighbours on a line of which only one has what must hold."""
        found: dict[tuple[str, float], None] = {}
        for line, spec in self.plan["lines"].items():
            for kind in spec["changes"]["adapters"]:
                own = [row for row in self.rows if row["line"] == f"{line}, {kind}"]
                values = between([row["label"] for row in own], [not needs.misses(row) for row in own])
                found |= dict.fromkeys((line, value) for value in values)
        return list(found)

    def confirm(self, rows: Sequence[Row]) -> None:
        """Give rows the mean over all seeds and its standard error, in place."""
        for row in rows:
            changes = {**row["changes"], "adapters": [row["adapters"]]}
            seeds = range(self.seed, self.seed + self.plan["seeds"])
            name = experiment_name("choose", *(f"{key} {value}" for key, value in changes.items()))
            wanted = {f"{name}-seed-{seed}": {**self.changes, **changes, "seed": seed} for seed in seeds}
            runs = [own[row["adapters"]] for own in self.figures(wanted).values()]
            for column in COLUMNS:
                row[column], row[f"{column} ±"] = over_seeds([each[column] for each in runs]) or (None, None)


def described(row: Mapping[str, Any]) -> str:
    """Say a setting's figures in a line."""

    def figure(name: str, unit: str = "") -> str:
        error = row.get(f"{name} ±")
        return "–" if row[name] is None else f"{row[name]:.2f}{'' if error is None else f' ± {error:.2f}'}{unit}"

    return (
        f"recovery {figure('recovery')}, the attacker lacks {figure('lacking', ' nats')}, {figure('bytes')} of the "
        f"model's bytes, {figure('exact')} as they are"
    )


def as_settings(row: Row) -> str:
    """Write a setting as `-S` and SET= take it."""
    changes = {**row["changes"], "adapters": f"[{row['adapters']}]"}
    return " ".join(f"{key}={value}" for key, value in changes.items())


def check_task(row: Row) -> None:
    """Raise UserError where the evaluated questions leave a recovery too uncertain to tell settings apart by it."""
    if row["recovery"] is None:
        raise UserError("choose: full fine-tuning gains nothing on this task, so there is no utility to choose by")
    if row["recovery error"] > UNSURE:
        raise UserError(
            f"choose: with so few questions a recovery is known to ± {row['recovery error']:.2f} only, which tells no "
            f"settings apart (at most {UNSURE} does); raise data.eval_questions, or take another task"
        )


def main() -> None:
    needs, changes = parse(sys.argv[1:])
    search = Search(yaml.safe_load(SETTINGS.read_text(encoding="utf-8")), changes)
    first, *rest = [(line, value) for line, spec in search.plan["lines"].items() for value in spec["values"]]
    search.run([first])
    check_task(search.rows[0])  # before the hours that the others take
    search.run(rest)
    search.run(search.halfway(needs))
    chosen = needs.best(search.rows)
    told = [chosen, *neighbours(search.rows, chosen)]
    search.confirm(told)
    tell(search.rows, needs, told)


def tell(rows: Sequence[Row], needs: Needs, told: Sequence[Row]) -> None:
    """Write all settings, draw them, and print the frontier and those that are told: the recommended one first."""
    write_csv(OUT / "choose.csv", [{**row, "changes": as_settings(row)} for row in rows], [*_columns()])
    drawn = [{**row, "recovery answer_nll": row["recovery"]} for row in rows]
    with atomic_file(OUT / "choose.png") as temporary:
        figures.save_png(figures.frontier(figures.by_line(drawn), [figures.LACKING]), temporary)
    table = Table("", "recovery", "the attacker lacks, nats", "bytes", "exact", title=f"all settings: {OUT}/choose.csv")
    for row in frontier(rows):
        numbers = (f"{known(row[name]):.2f}" for name in ("recovery", "lacking", "bytes", "exact"))
        table.add_row(Text(as_settings(row)), *numbers)
    console.print(table)
    for title, row in zip(("recommended", "beside it", "beside it"), told, strict=False):
        console.print(f"{title}: {as_settings(row)}", style="bold", **PLAIN)
        console.print(f"  {described(row)}", **PLAIN)
    for name, miss in needs.misses(told[0]).items():
        console.print(f"nothing here reaches {name.upper()}: the nearest misses it by {miss:.2f}", style="yellow")
    tried = " ".join(f"-S {part!r}" for part in as_settings(told[0]).split())
    console.print(f"try it: dvc exp run {tried}", **PLAIN)


def _columns() -> Iterator[str]:
    yield from ("line", "label", "adapters", "changes")
    for column in COLUMNS:
        yield from (column, f"{column} ±")


if __name__ == "__main__":
    run_command(main)
