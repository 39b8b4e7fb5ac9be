"""Attacks: what each α and β gives in utility, and what the recovery attack leaves of its privacy; the second frontier.

Beside them stand changes to the method, the variants in attacks.yaml. Every setting is a DVC experiment that runs the
pipeline and the stage `attack`, through DVC's queue as in the sweep. A run that is there already, as an experiment of
this commit or as figures in attacks-runs.csv, is not made again. `make attacks` runs it.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from scaleot_core import pictures
from scaleot_core.ending import ends_in_one_line
from scaleot_core.experiments import Changes, Figures, experiment_name, kept, read_metrics, run_all
from scaleot_core.files import whole_file
from scaleot_core.params import changed, load_params
from scaleot_core.progress import console
from scaleot_core.report import mean, over_seeds, write_csv

SETTINGS, OUT = Path(__file__).with_suffix(".yaml"), Path("docs/studies")
TARGETS = ("dvc.yaml", "studies/dvc.yaml:attack")
COLUMNS = (
    *("recovery acc", "recovery answer_nll", "gap acc", "gap answer_nll"),  # the paper's
    *("lacking", "won back", "won back answer_nll", "attacker acc", "model acc", "bytes exact"),  # the package's
    *("membership AUC", "membership true positives", "answers said", "answers said of others"),  # the adapter's
)


def figures(metrics: Mapping[str, Any], attack: Mapping[str, Any]) -> dict[str, float | None]:
    """Utility and privacy of one run, the mean over tasks, and what the attacker has in the end.

    `lacking` is the log-perplexity (nats) that the attacker's model still lacks to the real one; `won back` the share
    of the distance at the start that was made good, in log-perplexity and in answer nll. `answers said` is the share of
    the private questions' answers that the plug-in says word for word.
    """
    measured, end = metrics["tasks"], attack["recovery"]["package"]

    def over_tasks(name: str, metric: str) -> float | None:
        return mean([each[name][metric] for each in measured.values()])

    back: list[float | None] = []
    for task, each in measured.items():
        start, whole = (each[name]["answer_nll"] for name in ("emulator_zero_shot", "zero_shot"))
        back.append((start - end["tasks"][task]["answer_nll"]) / (start - whole) if start > whole else None)

    def members(name: str, figure: str) -> float | None:
        return mean([told[name][figure] for told in attack["membership"].values()])

    return {
        "recovery acc": over_tasks("recovery", "acc"),
        "recovery answer_nll": over_tasks("recovery", "answer_nll"),
        "gap acc": over_tasks("gap", "acc"),
        "gap answer_nll": over_tasks("gap", "answer_nll"),
        "lacking": math.log(end["perplexity"] / metrics["corpus_perplexity"]["model"]),
        "won back": end["recovered"],
        "won back answer_nll": mean(back),
        "attacker acc": mean([row["acc"] for row in end["tasks"].values()]),
        "model acc": over_tasks("zero_shot", "acc"),
        "bytes exact": attack["weights"]["exact"],
        "membership AUC": members("calibrated", "auc"),
        "membership true positives": members("calibrated", "true_positives"),
        "answers said": members("extracted", "members"),
        "answers said of others": members("extracted", "others"),
    }


def name_of(setting: str, seed: int) -> str:
    """The name of a setting's experiment."""
    return experiment_name("attacks", setting, "seed", seed)


def main() -> None:
    swept = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    own: dict[str, dict[str, Any]] = {
        f"alpha {alpha} beta {beta}": {"alpha": alpha, "beta": beta}
        for alpha in swept["alphas"]
        for beta in swept["betas"][: 1 if alpha == 1 else None]  # with α = 1 no layer is left for β
    }
    own |= swept["variants"]
    seeds = swept["seeds"]
    wanted = {
        name_of(name, seed): {**swept["changes"], **changes, "seed": seed}
        for seed in seeds
        for name, changes in own.items()
    }

    def make(missing: Mapping[str, Changes]) -> Iterator[tuple[str, Figures]]:
        for name, run in run_all(missing, "attacks", TARGETS):
            yield name, figures(read_metrics(run), read_metrics(run, "attack.json"))

    found = kept(OUT / "attacks-runs.csv", COLUMNS, wanted, make, *TARGETS)
    rows = []
    for name, changes in own.items():
        dial = changed(load_params(), changes)
        row: dict[str, Any] = {"variant": name if name in swept["variants"] else ""}
        row |= {"alpha": dial.alpha, "beta": dial.beta}
        seen = [found[name_of(name, seed)] for seed in seeds]
        for figure in COLUMNS:
            row[figure], row[f"{figure} ±"] = over_seeds([each[figure] for each in seen]) or (None, None)
        rows.append(row)
    write_csv(OUT / "attacks.csv", list(rows[0]), (list(row.values()) for row in rows))
    panels = [pictures.LACKING, pictures.GAPS["answer_nll"]]
    with whole_file(OUT / "attacks.png") as temporary:
        pictures.save_png(pictures.frontier(pictures.by_beta(rows), panels), temporary)
    shown = [name for name in rows[0] if not name.endswith("±")]
    table = Table(*shown, title=f"the dial under attack: {len(seeds)} seeds")
    for row in rows:
        table.add_row(row["variant"], *("–" if row[name] is None else f"{row[name]:.3g}" for name in shown[1:]))
    console.print(table)


if __name__ == "__main__":
    ends_in_one_line(main)
