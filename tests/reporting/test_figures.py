"""Pictures show what was measured, in words, and no text covers another."""

import math
import re
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from reported import GOOD, HISTORIES, LAYERS, perplexity, task_of

from scaleot_core.reporting import figures

TASKS = {
    "piqa": task_of(layers=GOOD, lora=GOOD),
    "text": task_of(layers=perplexity([30.0, 20.0, 60.0, 40.0, 25.0])),
}
PANELS = [figures.GAP_ACCURACY, figures.GAP_NLL]


def point(label, recovery, gap):
    figures_of = {"recovery": recovery, "gap": gap, "gap ±": 0.1}
    names = {"recovery": "recovery {}", "gap": "gap {}", "gap ±": "gap {} ±"}
    return {"label": label} | {
        names[name].format(metric): value for name, value in figures_of.items() for metric in ("acc", "answer_nll")
    }


LINES = {
    "β = 0": [point("0", 1.0, 0.0), point("0.25", 0.7, 0.2), point("0.5", 0.5, 0.4)],
    "β = 0.8": [point("0", 0.8, 0.2), point("1", None, 0.3), point("2", math.nan, 0.3)],
}
CURVE = [{"tokens": t, "perplexity": 100.0 - t} for t in (0, 10, 20)]


def drawn():
    return {
        "measurements": figures.measurements(TASKS),
        "layers": figures.layers(LAYERS),
        "curves": figures.curves(HISTORIES),
        "frontier": figures.frontier(LINES, PANELS),
        "over_tokens": figures.over_tokens({"package": CURVE}, "perplexity", "perplexity", yscale="log"),
    }


def texts(figure):
    return re.findall(r">([^<>]+)</text>", figures.svg(figure))


def share(path, colour) -> float:
    """How much of a picture is of one colour."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return float((np.abs(pixels - to_rgb(colour)).max(-1) < 0.01).mean())


@pytest.mark.slow
def test_pictures_show_what_was_measured_and_have_the_same_bytes_again(tmp_path):
    again = drawn()
    for name, figure in drawn().items():
        path, second = tmp_path / f"{name}.png", tmp_path / "again.png"
        figures.save_png(figure, path)
        figures.save_png(again[name], second)
        assert 0.3 < share(path, "white") < 0.99
        assert path.read_bytes() == second.read_bytes()
    assert share(tmp_path / "measurements.png", "#d1495b") > 3e-4  # the plug-in's points
    assert all(share(tmp_path / "layers.png", figures.LAYER_KINDS[kind][0]) > 0.01 for kind in LAYERS["kinds"])
    assert share(tmp_path / "curves.png", "C0") > 1e-4
    assert [figures.svg(figure) for figure in drawn().values()] == [figures.svg(figure) for figure in drawn().values()]


def test_pictures_speak_in_words():
    words = {*texts(figures.measurements(TASKS)), *texts(figures.layers(LAYERS))}
    assert {"piqa: accuracy", "text: perplexity", "plug-in, LoRA", "replaced by a harmonizer"} <= words
    assert not [word for word in words if "_" in word]


def test_layers_without_scores_still_show_what_became_of_them():
    kinds = {"prior": [], "scores": [], "kinds": ["compressed"] * 3}
    assert "compressed, frozen" in texts(figures.layers(kinds)) and "importance score" not in texts(
        figures.layers(kinds)
    )


def test_frontier_labels_the_ends_of_lines_and_leaves_out_what_is_undefined():
    figure = figures.frontier(LINES, PANELS)
    ET.fromstring(figures.svg(figure))
    labels = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert labels == [["0", "0.5", "0"]] * 2  # neither what lies between, nor an undefined recovery
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*LINES]


def test_line_without_labels_has_its_name_at_its_end_and_no_legend():
    figure = figures.frontier({"uniform": [point("", 0.1, 0.2), point("", 0.4, 0.3)]}, PANELS[:1])
    (text,) = figure.axes[0].texts
    assert text.get_text() == "uniform" and text.xy == (0.4, 0.3) and not figure.legends


def test_numbers_label_points_and_names_of_lines_are_in_words():
    rows = [{"line": "gradot, lora", "label": 0.25}, {"line": "gradot, lora", "label": ""}]
    assert {name: [row["label"] for row in line] for name, line in figures.by_line(rows).items()} == {
        "GradOT, LoRA": ["0.25", ""]
    }
