"""Tables of what was measured, for people and for plots."""

import csv

import pytest
from helpers import refusal
from reported import GOOD, HISTORIES, LAYERS, measured, perplexity, task_of

from scaleot_core.reporting import measurements, tables


def test_table_has_every_figure_with_its_error():
    text = perplexity([30.0, 20.0, 60.0, 40.0, 25.0])
    table = tables.measurement_table({"piqa": task_of(layers=GOOD), "text": task_of(layers=text)})
    names = [str(cell).strip() for cell in table.columns[0].cells]
    five = [*measurements.MEASUREMENTS[:3], "emulator_finetune, layers", "plug_in, layers"]
    assert names == ["piqa", *five, "text", *five]
    assert [column.header for column in table.columns] == ["", "acc", "answer_nll", "perplexity"]
    assert [list(column.cells)[5] for column in table.columns[1:]] == ["0.580 ± 0.010", "12.000 ± 0.100", "–"]
    assert [list(column.cells)[11] for column in table.columns[1:]] == ["–", "–", "25.000 ± 0.500"]


def test_every_kind_of_adapters_has_its_rows_and_its_line(capsys):
    better = measured([0.50, 0.60, 0.40, 0.45, 0.59], [20.0, 10.0, 30.0, 18.0, 11.0])
    metrics = {
        "tasks": {"piqa": task_of(layers=GOOD, lora=better)},
        "emulator": {"share_of_model": 0.7},
        "corpus_perplexity": {"model": 20.0, "emulator": 60.0},
    }
    table = tables.measurement_table(metrics["tasks"])
    names = [str(cell).strip() for cell in table.columns[0].cells]
    assert names[-2:] == ["emulator_finetune, lora", "plug_in, lora"] and len(names) == 8
    assert list(table.columns[1].cells)[-1] == "0.590 ± 0.010"
    tables.show(metrics)
    said = capsys.readouterr().err
    assert "piqa, adapters layers: gap +0.060 in acc, recovery 0.80" in said
    assert "piqa, adapters lora: gap +0.140 in acc, recovery 0.90" in said


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def test_curves_have_a_row_a_step(tmp_path):
    tables.write_curves(tmp_path / "loss", HISTORIES)
    assert rows_of(tmp_path / "loss" / "local fits.csv") == [["step", "loss"], ["0", "1.5"], ["1", "1.25"]]
    assert rows_of(tmp_path / "loss" / "DLR.csv") == [["step", "loss"], ["0", "3.0"]]


def test_layers_have_a_row_each_and_must_be_of_one_length(tmp_path):
    tables.write_layers(tmp_path / "layers.csv", LAYERS["prior"], LAYERS["scores"], LAYERS["kinds"])
    assert rows_of(tmp_path / "layers.csv") == [
        ["layer", "prior", "score", "kind"],
        ["0", "0.5", "1.5", "adapter"],
        ["1", "-1.0", "-2.0", "harmonizer"],
        ["2", "0.25", "1.25", "compressed"],
    ]
    with pytest.raises(ValueError):
        tables.write_layers(tmp_path / "short.csv", LAYERS["prior"][:2], LAYERS["scores"], LAYERS["kinds"])
    assert not (tmp_path / "short.csv").exists()


def test_text_between_the_marks_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("# a\n<!-- sweep -->\nold\n<!-- end of sweep -->\nb\n<!-- compare -->\n<!-- end of compare -->\n")
    tables.replace_between_marks(path, "sweep", "| new |\n")
    tables.replace_between_marks(path, "compare", "c")
    expected = "# a\n<!-- sweep -->\n| new |\n<!-- end of sweep -->\nb\n<!-- compare -->\nc\n<!-- end of compare -->\n"
    assert path.read_text() == expected
    assert "<!-- dial --> and <!-- end of dial -->" in refusal(tables.replace_between_marks, path, "dial", "text")
    assert path.read_text() == expected
