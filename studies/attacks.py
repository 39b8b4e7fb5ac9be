"""Attacks: the utility that each α and β gives, against what the restoration attack wins back from it.

Beside them are `channels.ratio` alone and the variants in attacks.yaml; each is tuned by its adapter layers and by LoRA
in every layer that is there, a row each. Every setting is a DVC experiment of the pipeline and the stage `attack`,
whose figures are kept in attacks-runs.csv. `make attack-study` runs it.

`make private-study` is the same study of private.yaml: every method's package, tuned with differential privacy.
"""

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.table import Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_file, write_csv
from scaleot_core.common.progress import console
from scaleot_core.params import changed, load_params
from scaleot_core.reporting import figures
from studies.columns import attack_columns, by_kind
from studies.experiments import Figures, Run, cached_figures, experiment_name
from studies.keys import ATTACK, Changes
from studies.means import ROW_NAMES, seed_means, spread

STUDIES, OUT = Path(__file__).parent, Path("docs/studies")
SHOWN = ("recovery acc", "recovery answer_nll", "gap answer_nll", "remaining gap", "bytes exact", "membership AUC")


class Dial(NamedTuple):
    """A setting: the line of the picture that it is on, what stands beside its point, what it changes."""

    line: str
    label: float | str
    changes: Changes


def dials(study: Mapping[str, Any]) -> dict[str, Dial]:
    """List a study's settings by name."""
    settings: dict[str, Dial] = {}
    for beta in study["betas"]:
        for alpha in study["alphas"]:
            if alpha < 1 or beta == study["betas"][0]:  # with α = 1 no layer is left for β
                changes = {"alpha": alpha, "beta": beta}
                settings[f"alpha {alpha} beta {beta}"] = Dial(figures.line_of(beta), alpha, changes)
    for ratio in study["channels"]:
        changes = {"alpha": 0.0, "beta": 0.0, "channels.ratio": ratio}
        settings[f"channels {ratio}"] = Dial("channels alone, over their share cut", ratio, changes)
    return settings | {name: Dial(name, "", changes) for name, changes in study["variants"].items()}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "attacks"
    if not (file := STUDIES / f"{name}.yaml").is_file():
        raise UserError(f"attacks: there is no study {name!r}; `attacks` and `private` are there")
    params, study = load_params(), yaml.safe_load(file.read_text(encoding="utf-8"))
    settings, seeds, kinds = dials(study), study["seeds"], study["changes"]["adapters"]
    names = {
        (setting, seed): experiment_name(name, setting, "seed", seed)
        for seed, setting in itertools.product(seeds, settings)
    }
    experiments = {
        names[setting, seed]: {**study["changes"], **settings[setting].changes, "seed": seed} for setting, seed in names
    }

    def measure(name: str, run: Run) -> Figures:
        metrics, attack = run.metrics, run.read("attack.json")
        return by_kind(lambda kind: attack_columns(metrics, attack, kind), kinds)

    runs = cached_figures(OUT / f"{name}-runs.csv", experiments, measure, name, ATTACK)
    rows = []
    for (setting, dial), kind in itertools.product(settings.items(), kinds):
        values = changed(params, dict(dial.changes))
        row: dict[str, Any] = {"line": ROW_NAMES[kind].format(dial.line), "label": dial.label, "adapters": kind}
        row |= {"method": values.method, "alpha": values.alpha, "beta": values.beta, "channels": values.channels.ratio}
        rows.append(row | spread(seed_means([runs[names[setting, seed]] for seed in seeds], kind)))
    write_csv(OUT / f"{name}.csv", rows)
    panels = [figures.REMAINING_GAP, figures.GAP_NLL]
    with atomic_file(OUT / f"{name}.png") as temporary:
        figures.save_png(figures.frontier(figures.by_line(rows), panels), temporary)
    table = Table("", *SHOWN, title=f"{name}: means of seeds {seeds}; all figures: {OUT}/{name}.csv")
    for (setting, kind), row in zip(itertools.product(settings, kinds), rows, strict=True):
        cells = ("–" if row[column] is None else f"{row[column]:.3g}" for column in SHOWN)
        table.add_row(ROW_NAMES[kind].format(setting), *cells)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
