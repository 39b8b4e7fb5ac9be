"""The report: what was measured on one HTML page that needs nothing else, no network, no script."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from scaleot_core.common.files import atomic_file
from scaleot_core.reporting import figures
from scaleot_core.reporting.measurements import by_row, five


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


def table(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Turn rows of one shape into cells under their names."""
    rows = list(rows)
    return [list(rows[0]), *([_number(value) for value in row.values()] for row in rows)] if rows else []


def _measurements(tasks: Mapping[str, Any]) -> Section:
    tables = []
    for task, measured in tasks.items():
        header = [task, *measured["metrics"]]
        cells = [
            [name, *(f"{figures[m]:.3f} ± {figures[f'{m}_stderr']:.3f}" for m in measured["metrics"])]
            for name, figures in by_row(measured).items()
        ]
        for kind, utility in measured["adapters"].items():
            for name in ("gap", "recovery"):
                cells.append([f"{name}, {kind}", *(_number(utility[name][metric]) for metric in measured["metrics"])])
        tables.append([header, *cells])
    text = (
        "Adapters are the adapter layers, as in the paper (layers), or LoRA in every layer that is there (lora). "
        "Gap is plug-in minus tuned emulator, recovery the plug-in's share of what full fine-tuning gains."
    )
    return Section("The five measurements", text, figures.svg(figures.measurements(tasks)), tables)


def _frontier(
    title: str,
    text: str,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Sequence[figures.Panel] = (figures.GAP_NLL,),
) -> Section:
    return Section(title, text, figures.svg(figures.frontier(lines, panels)))


def _capable(name: str, measured: Mapping[str, Any], judged: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Make a row a task of what a model can do: with choices, openly, and as shares of the way from floor to model.

    `judged` is each task's main metric.
    """
    above = measured.get("above_floor", {})
    return [
        {
            "model": name,
            "corpus perplexity": measured["perplexity"],
            "above floor": above.get("corpus"),
            "task": task,
            "metric": metric,
            "with choices": measured["tasks"][task][metric],
            "above chance": above.get(task, {}).get(metric),
            "text perplexity": measured["open"][task]["text_perplexity"],
            "text above floor": above.get(task, {}).get("text"),
            "answer tokens said": measured["open"][task]["answer_tokens"],
            "answers said": measured["open"][task]["answers"],
        }
        for task, metric in judged.items()
    ]


ATTACKERS = {
    "package": "trains everything in the package on the public corpus",
    "cut_only": "trains only what stands for what was cut, the rest is frozen",
    "queries": "trains everything, by what the served plug-in says of the corpus",
    "collusion": "trains several packages of the model, put together",
    "sibling": "trains a public relative of the model with the package in it",
    "model": "the real model, trained likewise: what the text alone teaches",
    "widened": "trains everything, with whole layers behind harmonizers and full ranks",
    "without_weights": "the floor: the same shapes with all but the adapter layers drawn anew",
    "uniform": "trains an emulator of equal bytes by uniform layer removal",
}


def _attack(attack: Mapping[str, Any], curves: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any]) -> Section:
    judged = {task: measured["metrics"][0] for task, measured in tasks.items()}
    attackers = [
        {
            "attacker": target,
            "what it does": ATTACKERS[target],
            "tokens": end["tokens"],
            "of the way to the model": end["recovered"],
        }
        for target, end in attack["restoration"].items()
    ]
    models = {"the real model": attack["before"]["model"], "before the attack": attack["before"]["package"]}
    models |= attack["restoration"]
    capable = [row for name, measured in models.items() for row in _capable(name, measured, judged)]
    difficulty = attack["recovery_difficulty"]
    weights = [{"of the model's bytes": kind, "share": share} for kind, share in attack["weights"].items()]
    membership = [
        {
            "task": task,
            "adapters": kind,
            "attack": name,
            "AUC": auc[name]["auc"],
            "±": auc[name]["auc_stderr"],
            "true positives at 1 % false": auc[name]["true_positives"],
            "private answers extracted": auc["extracted"]["members"],
            "held-out answers extracted": auc["extracted"]["others"],
        }
        for task, kinds in attack["membership"].items()
        for kind, auc in kinds.items()
        for name in ("loss", "calibrated")
    ]
    title = "Corpus perplexity of the attacker's model (more is better for the model owner)"
    targets = dict.fromkeys(row["target"] for row in curves)
    lines = {target: [row for row in curves if row["target"] == target] for target in targets}
    picture = figures.over_tokens(lines, "perplexity", title, yscale="log")
    text = (
        "Attackers train on public text, each on the same number of tokens. A share above floor or chance is 0 there "
        "and 1 for the real model. The floor is random weights of the same shapes with the same training; before the "
        "attack it is one who takes all tokens for equally likely. Text perplexity is that of questions and answers, "
        "another domain than the corpus. Answers are said without choices, greedily. "
        f"Recovery difficulty, the model's loss with what the package hides drawn anew, is {difficulty['loss']:.2f} ± "
        f"{difficulty['loss_stdev']:.2f} nats a token. "
        "The last tables are the weights given away, and what the adapter tells of records."
    )
    tables = [table(rows) for rows in (attackers, capable, weights, membership)]
    return Section("What an attacker makes of it", text, figures.svg(picture), tables)


COMPARED = [  # the comparison has a short name for answer NLL
    figures.GAP_ACCURACY,
    replace(figures.GAP_NLL, x="recovery nll", y="gap nll"),
]


def sections(
    metrics: Mapping[str, Any],
    layers: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    sweep: Sequence[Mapping[str, Any]] = (),
    compared: Sequence[Mapping[str, Any]] = (),
    attacks: Sequence[Mapping[str, Any]] = (),
    attack: tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]] | None = None,
) -> list[Section]:
    """Put the page's sections together.

    `costs` are what each stage's last run here took; `sweep`, `compared` and `attacks` the tables of `make sweep`,
    `make compare` and `make attack-study`, where they exist; `attack` is what `make attack` left: attack.json and its
    curves.
    """
    parts = [_measurements(metrics["tasks"])]
    if costs:
        rows = [{"stage": stage, **cost} for stage, cost in costs.items()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        parts.append(Section("What it cost", tables=[table({name: row.get(name) for name in names} for row in rows)]))
    if attack:
        parts.append(_attack(*attack, metrics["tasks"]))
    if sweep:
        text = "ScaleOT over α, the number beside a point, and β."
        parts.append(_frontier("The dial", text, figures.by_beta(sweep)))
    if attacks:
        text = (
            "ScaleOT over α, β and channels.ratio (the number beside a point), and variants of the default: "
            "what an attacker is left without, and the paper's gap."
        )
        panels = [figures.REMAINING_GAP, figures.GAP_NLL]
        parts.append(_frontier("The dial under attack", text, figures.by_line(attacks), panels))
    if compared:
        lines = {row["method"]: [{**row, "label": ""}] for row in compared}
        text = "Each method at the same bytes, mean over tasks and seeds."
        parts.append(_frontier("Methods", text, lines, COMPARED))
    kinds = list(zip(*(layers[name] for name in ("prior", "scores", "kinds")), strict=True))
    rows = [{"layer": i, "prior": p, "score": s, "became": kind} for i, (p, s, kind) in enumerate(kinds)]
    text = "Scores over depth, and what became of each layer."
    parts.append(Section("Layers", text, figures.svg(figures.layers(layers)), [table(rows)]))
    parts.append(Section("Losses", "Of every stage that trains.", figures.svg(figures.curves(histories))))
    return parts


def answer(metrics: Mapping[str, Any]) -> list[str]:
    """Return a sentence a task and kind of adapters on what was gained, and one on what the emulator gives away."""
    sentences = []
    for task, measured in metrics["tasks"].items():
        metric = measured["metrics"][0]
        for kind in measured["adapters"]:
            measurements = five(measured, kind)
            before, after, ceiling, tuned = (
                measurements[name][metric] for name in ("zero_shot", "plug_in", "full_finetune", "emulator_finetune")
            )
            recovery = measurements["recovery"][metric]
            share = "" if recovery is None else f", {recovery:.0%} of its gain"
            sentences.append(
                f"{task}, adapters {kind}: the plug-in has {metric} {after:.3f}, the model had {before:.3f} and has "
                f"{ceiling:.3f} with full fine-tuning{share}; the tuned emulator alone has {tuned:.3f}."
            )
    emulator, perplexity = metrics["emulator"], metrics["corpus_perplexity"]
    sentences.append(
        f"The emulator gives away {emulator['share_of_model']:.0%} of the model's bytes and has a corpus perplexity of "
        f"{perplexity['emulator']:.1f}, the model {perplexity['model']:.1f}."
    )
    return sentences


def write(
    path: Path, title: str, sentences: Sequence[str], summary: Mapping[str, Any], parts: Sequence[Section]
) -> None:
    """Write the page, whole or not at all: title, the answer in sentences, the settings, the sections."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=select_autoescape(("jinja",)), trim_blocks=True)
    text = environment.get_template("report.html.jinja").render(
        title=title, sentences=sentences, summary=summary, sections=parts
    )
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
