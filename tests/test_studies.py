"""The studies run from end to end on a tiny model, and their tables say what they should."""

import csv
import math
import runpy
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, form, tiny_model, write_project
from test_stages import settings, succeed
from transformers import PreTrainedTokenizerFast

from scaleot_core.importance import new_harmonizers
from scaleot_core.params import Params, changed

__all__ = ["settings"]  # a fixture


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "project"
    folder.mkdir()
    write_project(folder, tokenizer)
    shutil.copytree(ROOT / "studies", folder / "studies", ignore=shutil.ignore_patterns("__pycache__"))
    succeed(folder, "prepare_data", "layer_importance", "train_harmonizers")
    return folder


def table(folder: Path, study: str) -> list[dict[str, str]]:
    with chdir(folder):
        runpy.run_path(f"studies/{study}.py", run_name="__main__")
    with (folder / "docs" / "studies" / f"{study}.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_harmonizers(trained: Path) -> None:
    rows = table(trained, "harmonizers")
    study = runpy.run_path(str(trained / "studies/harmonizers.py"))
    assert [(row["variant"], int(row["seed"])) for row in rows] == [
        (name, seed) for seed in study["SEEDS"] for name in study["VARIANTS"]
    ]
    for row in rows:
        assert all(float(row[f"alpha={alpha}"]) > 1 for alpha in study["ALPHAS"])
    dropped = [row for row in rows if row["variant"] == "layers dropped"]
    assert len({row["alpha=0.5"] for row in dropped}) == 1  # no seed in it, and no token
    assert {row["tokens"] for row in dropped} == {"0"}


def test_ridge_is_the_best_linear_map_of_its_rank(trained: Path) -> None:
    linear_map = runpy.run_path(str(trained / "studies/harmonizers.py"))["LinearMap"]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=draw)
    low = torch.randn(12, 3, generator=draw) @ torch.randn(3, 12, generator=draw)
    exact = linear_map(x, x + x @ low + 2, 4, ridge=1e-9)  # rank 3, and a constant
    torch.testing.assert_close(exact(x), x + x @ low + 2, rtol=1e-3, atol=1e-3)
    errors = [(linear_map(x, x + x @ low + 2, rank)(x) - x - x @ low - 2).square().mean() for rank in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True) and errors[1] > 100 * errors[2]


def test_scores(trained: Path) -> None:
    rows = {row["estimator"]: row for row in table(trained, "scores")}
    assert {"sensitivity", "block_influence", "taylor", "DLR from the prior", "DLR from zero", "random"} <= rows.keys()
    for row in rows.values():
        assert all(abs(float(row[name])) <= 1 or math.isnan(float(row[name])) for name in ("layers", "sets"))
    truth = rows["true cost of each layer alone"]
    assert float(truth["sets by cost"]) == pytest.approx(1)  # sets of one, of four layers


def test_true_cost_is_the_loss_of_replacing_a_set(trained: Path) -> None:
    model = tiny_model("llama")
    study = runpy.run_path(str(trained / "studies/scores.py"))
    blocks = torch.randint(1, 256, (4, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    costs = study["true_costs"](model, new_harmonizers(model, form(8), seed=0), [[], [0], [0, 1, 2, 3]], blocks)
    assert costs[0] == 0 and costs[1] != 0 and costs[2] != costs[1]


def outcome(gap: float, recovery: float | None, *, gained: float = 0.2) -> dict[str, float | None]:
    """One task's figures as DVC shows them, each accuracy with a standard error of 0.03."""
    figures = {"gap.acc": gap, "recovery.acc": recovery, "zero_shot.acc": 0.3, "full_finetune.acc": 0.3 + gained}
    errors = {"plug_in.acc_stderr": 0.03, "emulator_finetune.acc_stderr": 0.03}
    return {f"tasks.piqa.{key}": value for key, value in {**figures, **errors}.items()}


@pytest.mark.parametrize(
    ("row", "moved"),
    [
        (outcome(0.05, 0.8), False),
        (outcome(0.09, 0.8), False),  # 0.04 of 0.042
        (outcome(0.10, 0.8), True),
        (outcome(0.00, 0.8), True),
        (outcome(0.05, 0.66), False),  # 0.14 of 0.15
        (outcome(0.05, 0.60), True),
    ],
)
def test_an_ablation_that_moves_by_more_than_a_standard_error_is_confirmed(
    row: dict[str, float | None], moved: bool
) -> None:
    study = runpy.run_path(str(ROOT / "studies/ablations.py"))
    assert study["moves"](row, outcome(0.05, 0.8), ["piqa"]) is moved


def test_recovery_counts_only_where_there_is_something_to_recover() -> None:
    study = runpy.run_path(str(ROOT / "studies/ablations.py"))
    assert not study["moves"](outcome(0.05, None, gained=0), outcome(0.05, None, gained=0), ["piqa"])


def test_summary_has_an_error_only_of_several() -> None:
    summary = runpy.run_path(str(ROOT / "studies/ablations.py"))["summary"]
    assert summary([0.25]) == ("0.250", "")
    assert summary([0.1, 0.3]) == ("0.200", "0.100")
    assert summary([0.1, None]) == ("", "")


def test_every_ablation_changes_a_parameter_to_an_allowed_value(params: Params) -> None:
    ablations = yaml.safe_load((ROOT / "studies/ablations.yaml").read_text())
    assert ablations.pop("default") == {}
    for changes in ablations.values():
        assert changed(params, changes) != params


def setting(alpha: float, beta: float, nll: float) -> dict[str, float]:
    figures = {"emulator_finetune answer_nll": nll, "plug_in answer_nll": alpha, "gap answer_nll ±": 0.1}
    return {"alpha": alpha, "beta": beta, **figures}


def test_dial_that_turns_back_is_told() -> None:
    turns = runpy.run_path(str(ROOT / "studies/sweep.py"))["turns"]
    grid = [setting(0.0, 0.0, 5.0), setting(0.5, 0.0, 6.0), setting(1.0, 0.0, 5.9), setting(0.5, 0.8, 4.0)]
    assert turns(grid, "alpha", "beta") == []  # 0.1 nats is within the error
    (told,) = turns(grid, "beta", "alpha")
    assert told == "beta 0.0 to 0.8 at alpha = 0.5: emulator_finetune gains 2.00 nats"
    grid[1]["plug_in answer_nll"] = 3.0
    assert "alpha 0.5 to 1.0 at beta = 0.0: plug_in gains 2.00 nats" in turns(grid, "alpha", "beta")


def test_sweep_is_drawn_and_no_setting_runs_twice(tmp_path: Path) -> None:
    made: list[str] = []
    study = runpy.run_path(str(ROOT / "studies/sweep.py"))

    def run(name: str, changes: dict[str, float]) -> dict[str, float]:
        made.append(name)
        figures = {f"{n}.{m}": 0.5 - 0.1 * changes["alpha"] for n in ("gap", "recovery") for m in ("acc", "answer_nll")}
        for name in ("plug_in", "emulator_finetune"):
            figures |= {f"{name}.{m}{e}": 0.1 for m in ("acc", "answer_nll") for e in ("", "_stderr")}
        row = {f"tasks.{task}.{key}": value for task in ("a", "b") for key, value in figures.items()}
        return row | {"emulator.share_of_model": 0.7, "corpus_perplexity.emulator": 50.0}

    study["point"].__globals__["run"] = run
    grid = [(alpha, beta) for alpha in study["ALPHAS"] for beta in study["BETAS"]]
    rows = [{"alpha": a, "beta": b, **study["figures"](study["point"](a, b), ["a", "b"])} for a, b in grid]
    assert len(set(made)) == len(grid) - len(study["BETAS"]) + 1
    assert rows[0]["gap acc"] == pytest.approx(0.5) and rows[0]["gap acc ±"] == pytest.approx((4 * 0.01) ** 0.5 / 2)
    unfit = {"tasks.a.recovery.acc": None}  # full fine-tuning gained nothing
    study["point"].__globals__["run"] = lambda name, changes: run(name, changes) | unfit
    none = study["figures"](study["point"](0.0, 0.0), ["a", "b"])
    assert math.isnan(none["recovery acc"]) and none["gap acc"] == 0.5
    study["draw"](tmp_path / "dial.png", [*rows[1:], {**rows[0], **none}])
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")
