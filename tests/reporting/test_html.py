"""The page has every part, and needs nothing but itself."""

import re
from html.parser import HTMLParser

import pytest
from reported import GOOD, HISTORIES, LAYERS, perplexity, task_of

from scaleot_core.reporting import html

TASKS = {
    "piqa": task_of(layers=GOOD, lora=GOOD),
    "text": task_of(layers=perplexity([30.0, 20.0, 60.0, 40.0, 25.0])),
}
POINT = {"recovery answer_nll": 0.5, "gap answer_nll": 0.25, "gap answer_nll ±": 0.1}
CURVE = [{"target": "package", "tokens": t, "perplexity": 100.0 - t, "recovered": t / 100} for t in (0, 10, 20)]
METRICS = {
    "tasks": TASKS,
    "emulator": {"share_of_model": 0.74},
    "corpus_perplexity": {"emulator": 121.25, "model": 26.5},
}
COSTS = {"compress": {"tokens": 5, "seconds": 2.5, "peak_memory_mib": 900}, "evaluate": {"seconds": 7.0}}


class Reader(HTMLParser):
    """What a page names: its tags, and every address."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def written(tmp_path):
    compared = {f"{f} {m}{e}": 0.3 for f in ("recovery", "gap") for m in ("acc", "nll") for e in ("", " ±")}
    rows = [{"method": "uniform", **compared}, {"method": "scaleot", **compared, "recovery acc": ""}]
    sweep = [{"alpha": a, "beta": b, **POINT} for a in (0.0, 0.5) for b in (0.0, 0.8)]
    attacks = [
        {"line": "over α", **row, "label": row["alpha"], "remaining gap": 1.5, "remaining gap ±": ""} for row in sweep
    ]
    attacks.append({**attacks[0], "line": "half the channels", "label": ""})
    told = {"auc": 0.625, "auc_stderr": 0.01, "true_positives": 0.03}
    said = {"members": 0.1, "others": 0.05}
    spoken = {"text_perplexity": 41.5, "answer_tokens": 0.3, "answers": 0.0625}
    capable = {
        "perplexity": 33.0,
        "tasks": {"piqa": {"acc": 0.59}, "text": {"perplexity": 33.0}},
        "open": {"piqa": spoken, "text": spoken},
    }
    above = {"piqa": {"text": 0.5, "acc": 0.8125}, "text": {"text": 0.75}}
    attack = {
        "before": {"model": capable, "package": {**capable, "above_floor": {**above, "corpus": 0.4375}}},
        "restoration": {name: {**CURVE[-1], **capable} for name in ("package", "collusion", "without_weights")},
        "recovery_difficulty": {"loss": 9.375, "loss_stdev": 0.25},
        "weights": {"exact": 0.6125, "rank": 0.1, "none": 0.2875},
        "membership": {"piqa": {"lora": {"loss": told, "calibrated": told, "extracted": said}}},
    }
    parts = html.sections(
        METRICS, LAYERS, HISTORIES, costs=COSTS, sweep=sweep, compared=rows, attacks=attacks, attack=(attack, CURVE)
    )
    summary = {"model": "<script>alert(1)</script>"}
    html.write(tmp_path / "report.html", "ScaleOT on <b>piqa</b>", html.answer(METRICS), summary, parts)
    return tmp_path / "report.html"


@pytest.mark.slow
def test_page_has_every_part_and_needs_nothing_else(written):
    reader = Reader()
    reader.feed(written.read_text())
    assert reader.tags.count("svg") == 7 and "script" not in reader.tags and "b" not in reader.tags
    assert not [address for address in reader.addresses if not address.startswith("#")]
    assert "http" not in re.sub(r"http://www\.w3\.org/[\w/.]*", "", written.read_text())
    for part in (
        *("The dial under attack", "half the channels", "What an attacker makes of it", "above chance", "0.8125"),
        *("0.4375", "0.0625", "9.38 ± 0.25 nats", "the floor: the same shapes", "0.6125"),
        *("0.625", "Losses", "uniform", "plug_in", "900"),
    ):
        assert part in reader.text, part
    assert "nan" not in reader.text.lower()
    parts = ["74% of the model's bytes", "The five measurements", "What it cost", "The dial", "Methods", "Layers"]
    assert [reader.text.index(part) for part in parts] == sorted(reader.text.index(part) for part in parts)


def test_answer_has_every_task_and_kind_of_adapters_and_what_is_given_away():
    said = html.answer(METRICS)
    assert len(said) == 4
    good = TASKS["piqa"]["adapters"]["lora"]
    assert f"the plug-in has acc {good['plug_in']['acc']:.3f}" in said[1]
    assert f"{good['recovery']['acc']:.0%} of its gain; the tuned emulator alone has" in said[1]
    assert "corpus perplexity of 121.2, the model 26.5" in said[-1]
