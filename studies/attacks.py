"""Attacks: the utility that each α and β gives, against what the restoration attack wins back from it.

Beside them are `channel_pruning.ratio` alone and the variants in attacks.yaml; each is tuned by its adapter layers and
by LoRA in every layer that is there, a row each. Every setting is a DVC experiment that
runs the pipeline and the stage `attack`, through DVC's queue as in the sweep. A run that exists already, as an
experiment of this commit or as figures in attacks-runs.csv, is not repeated. `make attack-study` runs it.

`make private-study` is the same study of private.yaml: every method's package, tuned with differential privacy.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_file, write_csv
from scaleot_core.common.progress import console
from scaleot_core.params import changed, load_params
from scaleot_core.reporting import figures
from scaleot_core.reporting.measurements import mean, of_kind, over_seeds
from studies.experiments import Changes, Figures, cached_figures, experiment_name, read_metrics, run_all

STUDIES, OUT = Path(__file__).parent, Path("docs/studies")
KINDS = {"layers": "{}", "lora": "{}, lora"}  # of adapters, and the names of a setting's rows
TARGETS = ("dvc.yaml", "studies/dvc.yaml:attack")
COLUMNS = (
    *("recovery acc", "recovery answer_nll", "gap acc", "gap answer_nll"),  # the paper's
    *("remaining gap", "won back", "attacker acc", "model acc", "bytes exact", "difficulty"),  # the package's
    *("membership AUC", "membership true positives", "answers said", "answers said of others"),  # the adapter's
)
SHOWN = ("recovery acc", "recovery answer_nll", "gap answer_nll", "remaining gap", "bytes exact", "membership AUC")


def remaining_gap(metrics: Mapping[str, Any], attack: Mapping[str, Any]) -> float:
    """Compute the log-perplexity (nats) that still separates the attacker's model from the real one."""
    end = attack["restoration"]["package"]["perplexity"]
    return math.log(end / metrics["corpus_perplexity"]["model"])


def run_figures(metrics: Mapping[str, Any], attack: Mapping[str, Any], kind: str) -> dict[str, float | None]:
    """Utility and privacy of one run's adapters of a kind, the mean over tasks, and what the attacker has in the end.

    `won back` is the share of the distance at the start that was made good; `difficulty` the recovery difficulty
    (nats); `answers said` the share of the private questions' answers that the plug-in says word for word.
    """
    measured, end = of_kind(metrics, kind)["tasks"], attack["restoration"]["package"]

    def over_tasks(name: str, metric: str) -> float | None:
        return mean([each[name][metric] for each in measured.values()])

    def members(name: str, figure: str) -> float | None:
        return mean([told[kind][name][figure] for told in attack["membership"].values()])

    return {
        "recovery acc": over_tasks("recovery", "acc"),
        "recovery answer_nll": over_tasks("recovery", "answer_nll"),
        "gap acc": over_tasks("gap", "acc"),
        "gap answer_nll": over_tasks("gap", "answer_nll"),
        "remaining gap": remaining_gap(metrics, attack),
        "won back": end["recovered"],
        "attacker acc": mean([row["acc"] for row in end["tasks"].values()]),
        "model acc": over_tasks("zero_shot", "acc"),
        "bytes exact": attack["weights"]["exact"],
        "difficulty": attack["recovery_difficulty"]["loss"],
        "membership AUC": members("calibrated", "auc"),
        "membership true positives": members("calibrated", "true_positives"),
        "answers said": members("extracted", "members"),
        "answers said of others": members("extracted", "others"),
    }


def settings(swept: Mapping[str, Any]) -> dict[str, tuple[str, float | str, Changes]]:
    """Every setting by its name: the line of the picture that it is on, what stands beside its point, its changes."""
    found: dict[str, tuple[str, float | str, Changes]] = {}
    for beta in swept["betas"]:
        for alpha in swept["alphas"]:
            if alpha < 1 or beta == swept["betas"][0]:  # with α = 1 no layer is left for β
                changes = {"alpha": alpha, "beta": beta}
                found[f"alpha {alpha} beta {beta}"] = figures.line_of(beta), alpha, changes
    for share in swept["channels"]:
        changes = {"alpha": 0.0, "beta": 0.0, "channel_pruning.ratio": share}
        found[f"channels {share}"] = "channels alone, over their share cut", share, changes
    return found | {name: (name, "", changes) for name, changes in swept["variants"].items()}


def main() -> None:
    study = sys.argv[1] if len(sys.argv) > 1 else "attacks"
    if not (file := STUDIES / f"{study}.yaml").is_file():
        raise UserError(f"attacks: there is no study {study!r}; `attacks` and `private` are there")
    params, swept = load_params(), yaml.safe_load(file.read_text(encoding="utf-8"))
    own, seeds, kinds = settings(swept), swept["seeds"], swept["changes"]["adapters"]
    names = {(name, seed): experiment_name(study, name, "seed", seed) for seed in seeds for name in own}
    wanted = {
        experiment: {**swept["changes"], **own[name][2], "seed": seed} for (name, seed), experiment in names.items()
    }

    def make(missing: Mapping[str, Changes]) -> Iterator[tuple[str, Figures]]:
        for name, run in run_all(missing, study, TARGETS):
            metrics, attack = read_metrics(run), read_metrics(run, "attack.json")
            each = {kind: run_figures(metrics, attack, kind) for kind in kinds}
            yield name, {f"{column}, {kind}": each[kind][column] for kind in kinds for column in COLUMNS}

    columns = [f"{column}, {kind}" for kind in kinds for column in COLUMNS]
    found = cached_figures(OUT / f"{study}-runs.csv", columns, wanted, make, *TARGETS)
    rows = []
    for (name, (line, label, changes)), kind in itertools.product(own.items(), kinds):
        dial = changed(params, dict(changes))
        row: dict[str, Any] = {"line": KINDS[kind].format(line), "label": label, "adapters": kind}
        row |= {"method": dial.method, "alpha": dial.alpha, "beta": dial.beta, "channels": dial.channel_pruning.ratio}
        seen = [found[names[name, seed]] for seed in seeds]
        for figure in COLUMNS:
            values = [each[f"{figure}, {kind}"] for each in seen]
            row[figure], row[f"{figure} ±"] = over_seeds(values) or (None, None)
        rows.append(row)
    write_csv(OUT / f"{study}.csv", rows)
    panels = [figures.REMAINING_GAP, figures.GAP_NLL]
    with atomic_file(OUT / f"{study}.png") as temporary:
        figures.save_png(figures.frontier(figures.by_line(rows), panels), temporary)
    table = Table("", *SHOWN, title=f"{study}: means of seeds {seeds}; all figures: {OUT}/{study}.csv")
    for (name, kind), row in zip(itertools.product(own, kinds), rows, strict=True):
        table.add_row(
            KINDS[kind].format(name), *("–" if row[figure] is None else f"{row[figure]:.3g}" for figure in SHOWN)
        )
    console.print(table)


if __name__ == "__main__":
    run_command(main)
