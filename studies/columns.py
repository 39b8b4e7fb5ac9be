"""Read each study's columns from what a run measured: metrics.json, and attack.json where it was attacked.

Utility is of one kind of adapters, tuning them being a study's own question. This file is in the key of every row that
the studies keep, so nothing else belongs into it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from scaleot_core.reporting.measurements import MEASUREMENTS, judged_by, mean, of_kind, utility

Metrics = Mapping[str, Any]
"""All of metrics.json."""
Attack = Mapping[str, Any]
"""All of attack.json."""
Columns = dict[str, float | None]
"""Figures by their column's name; None for one that is undefined, as a recovery may be."""


def over_tasks(metrics: Metrics, kind: str, measurement: str, metric: str) -> float | None:
    """Average a figure over tasks; None where a task has none."""
    tasks = of_kind(metrics, kind)["tasks"].values()
    return mean([task[measurement][metric] for task in tasks])


def remaining_gap(metrics: Metrics, attack: Attack) -> float:
    """Compute the log-perplexity (nats) that still separates the attacker's model from the real one."""
    return math.log(attack["restoration"]["package"]["perplexity"] / metrics["corpus_perplexity"]["model"])


def comparison_columns(metrics: Metrics, kind: str) -> Columns:
    """Read what `make compare` compares methods by.

    Recovery is that of the means over tasks: where a task has little to gain, its own would divide by next to nothing.
    """
    means = {
        name: {metric: over_tasks(metrics, kind, name, metric) for metric in ("acc", "answer_nll")}
        for name in MEASUREMENTS
    }
    recovery = utility({**means, "metrics": ["acc", "answer_nll"], "lower_is_better": ["answer_nll"]})["recovery"]
    return {
        "recovery acc": recovery["acc"],
        "recovery nll": recovery["answer_nll"],
        "plug-in acc": means["plug_in"]["acc"],
        "plug-in nll": means["plug_in"]["answer_nll"],
        "emulator acc": means["emulator_zero_shot"]["acc"],
        "tuned emulator acc": means["emulator_finetune"]["acc"],
        "tuned emulator nll": means["emulator_finetune"]["answer_nll"],
        "gap acc": over_tasks(metrics, kind, "gap", "acc"),
        "gap nll": over_tasks(metrics, kind, "gap", "answer_nll"),
        "share of bytes": metrics["emulator"]["share_of_model"],
        "perplexity": metrics["corpus_perplexity"]["emulator"],
    }


def attack_columns(metrics: Metrics, attack: Attack, kind: str) -> Columns:
    """Read utility, and what an attacker has of the package and of the adapters, for `make attack-study`.

    `won back` is the share of the distance at the start that was made good; `difficulty` the recovery difficulty
    (nats); `answers said` the share of the private questions' answers that the plug-in says word for word.
    """
    end = attack["restoration"]["package"]

    def members(name: str, figure: str) -> float | None:
        return mean([kinds[kind][name][figure] for kinds in attack["membership"].values()])

    return {
        "recovery acc": over_tasks(metrics, kind, "recovery", "acc"),
        "recovery answer_nll": over_tasks(metrics, kind, "recovery", "answer_nll"),
        "gap acc": over_tasks(metrics, kind, "gap", "acc"),
        "gap answer_nll": over_tasks(metrics, kind, "gap", "answer_nll"),
        "remaining gap": remaining_gap(metrics, attack),
        "won back": end["recovered"],
        "attacker acc": mean([row["acc"] for row in end["tasks"].values()]),
        "model acc": over_tasks(metrics, kind, "zero_shot", "acc"),
        "bytes exact": attack["weights"]["exact"],
        "difficulty": attack["recovery_difficulty"]["loss"],
        "membership AUC": members("calibrated", "auc"),
        "membership true positives": members("calibrated", "true_positives"),
        "answers said": members("extracted", "members"),
        "answers said of others": members("extracted", "others"),
    }


def choice_columns(metrics: Metrics, attack: Attack, kind: str) -> Columns:
    """Read what `make choose` chooses by: utility in each task's least noisy metric, and what the attacker lacks.

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


def by_kind(read: Callable[[str], Columns], kinds: Mapping[str, Any] | list[str]) -> Columns:
    """Read columns for each kind of adapters, as `gap acc, lora`."""
    return {f"{column}, {kind}": figure for kind in kinds for column, figure in read(kind).items()}
