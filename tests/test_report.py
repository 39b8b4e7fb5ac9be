"""What the measurements come to: gap, recovery, order, tables and pictures."""

import csv

import pytest

from scaleot_core.reporting import measurements, tables

HISTORIES = {
    "local fits": [{"step": 0, "loss": 1.5, "more": 7}, {"step": 1, "loss": 1.25}],
    "DLR": [{"step": 0, "loss": 3.0}],
}
LAYERS = {"prior": [0.5, -1.0, 0.25], "scores": [1.5, -2.0, 1.25], "kinds": ["adapter", "harmonizer", "compressed"]}


def measured(acc, nll):
    """The five measurements, in the order of `report.MEASUREMENTS`."""
    rows = zip(measurements.MEASUREMENTS, acc, nll, strict=True)
    five = {n: {"acc": a, "acc_stderr": 0.01, "answer_nll": b, "answer_nll_stderr": 0.1} for n, a, b in rows}
    return five | {"metrics": ["acc", "answer_nll"], "lower_is_better": ["answer_nll"]}


# zero_shot, full_finetune, emulator_zero_shot, emulator_finetune, plug_in
GOOD = measured([0.50, 0.60, 0.40, 0.52, 0.58], [20.0, 10.0, 30.0, 18.0, 12.0])


def test_gap_and_recovery_follow_their_equations():
    found = measurements.utility(GOOD)
    assert found["gap"] == pytest.approx({"acc": 0.06, "answer_nll": 6.0})
    assert found["recovery"] == pytest.approx({"acc": 0.8, "answer_nll": 0.8})


def test_worse_plug_in_is_negative_in_every_metric():
    found = measurements.utility(measured([0.50, 0.60, 0.40, 0.52, 0.45], [20.0, 10.0, 30.0, 18.0, 25.0]))
    assert found["gap"] == pytest.approx({"acc": -0.07, "answer_nll": -7.0})
    assert found["recovery"] == pytest.approx({"acc": -0.5, "answer_nll": -0.5})


@pytest.mark.parametrize("ceiling", [0.50, 0.45])
def test_recovery_is_none_where_full_finetuning_gained_nothing(ceiling):
    found = measurements.utility(measured([0.50, ceiling, 0.40, 0.52, 0.58], [20.0, 10.0, 30.0, 18.0, 12.0]))
    assert found["recovery"]["acc"] is None and found["recovery"]["answer_nll"] == pytest.approx(0.8)
    assert found["gap"]["acc"] == pytest.approx(0.06)


def perplexity(values):
    five = {
        n: {"perplexity": v, "perplexity_stderr": 0.5} for n, v in zip(measurements.MEASUREMENTS, values, strict=True)
    }
    return five | {"metrics": ["perplexity"], "lower_is_better": ["perplexity"]}


def test_less_perplexity_is_better():
    found = measurements.utility(perplexity([30.0, 20.0, 60.0, 40.0, 25.0]))
    assert found == {"gap": {"perplexity": 15.0}, "recovery": {"perplexity": 0.5}}
    assert measurements.misordered(perplexity([30.0, 20.0, 60.0, 40.0, 35.0])) == [
        "plug_in is not better than zero_shot in perplexity"
    ]


@pytest.mark.parametrize(
    ("acc", "nll", "said"),
    [
        (0.58, 12.0, []),
        (0.51, 12.0, ["emulator_finetune in acc"]),
        (0.50, 12.0, ["zero_shot in acc", "emulator_finetune in acc"]),
        (0.58, 19.0, ["emulator_finetune in answer_nll"]),
        (0.58, 21.0, ["zero_shot in answer_nll", "emulator_finetune in answer_nll"]),
    ],
)
def test_broken_order_is_told(acc, nll, said):
    given = measured([0.50, 0.60, 0.40, 0.52, acc], [20.0, 10.0, 30.0, 18.0, nll])
    assert measurements.misordered(given) == [f"plug_in is not better than {what}" for what in said]


def test_table_has_every_figure_with_its_error():
    table = tables.measurement_table({"piqa": GOOD, "text": perplexity([30.0, 20.0, 60.0, 40.0, 25.0])})
    names = [str(cell).strip() for cell in table.columns[0].cells]
    assert names == ["piqa", *measurements.MEASUREMENTS, "text", *measurements.MEASUREMENTS]
    assert [column.header for column in table.columns] == ["", "acc", "answer_nll", "perplexity"]
    assert [list(column.cells)[5] for column in table.columns[1:]] == ["0.580 ± 0.010", "12.000 ± 0.100", "–"]
    assert [list(column.cells)[11] for column in table.columns[1:]] == ["–", "–", "25.000 ± 0.500"]


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
