"""The studies run from end to end on a tiny model, and their tables say what they should."""

import csv
import math
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, refusal, succeed, task_of, tiny_model, write_project
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.errors import UserError
from scaleot_core.compression.layer_importance import new_harmonizers
from scaleot_core.params import Params, changed, load_params
from scaleot_core.reporting.measurements import MEASUREMENTS, of_kind
from studies import harmonizers, scores
from studies.experiments import code


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "project"
    folder.mkdir()
    write_project(folder, tokenizer)
    succeed(folder, "prepare_data", "layer_importance", "train_harmonizers")
    return folder


def table(folder: Path, study: ModuleType) -> list[dict[str, str]]:
    with chdir(folder):
        study.main()
    with (folder / study.OUT).open() as stream:
        return list(csv.DictReader(stream))


def test_harmonizers(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {
        name: {key: min(value, 20) if key.endswith("steps") else value for key, value in changes.items()}
        for name, changes in harmonizers.VARIANTS.items()
    }
    monkeypatch.setattr(harmonizers, "VARIANTS", few)
    monkeypatch.setattr(harmonizers, "SEEDS", (0, 1))
    rows = table(trained, harmonizers)
    assert [(row["variant"], int(row["seed"])) for row in rows] == [(name, seed) for seed in (0, 1) for name in few]
    for row in rows:
        assert all(float(row[f"alpha={alpha}"]) > 1 for alpha in harmonizers.ALPHAS)
    dropped = [row for row in rows if row["variant"] == "layers dropped"]
    assert len({row["alpha=0.5"] for row in dropped}) == 1  # no seed in it, and no token
    assert {row["tokens"] for row in dropped} == {"0"}


def test_ridge_is_the_best_linear_map_of_its_rank() -> None:
    linear_map = harmonizers.LinearMap
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=draw)
    low = torch.randn(12, 3, generator=draw) @ torch.randn(3, 12, generator=draw)
    exact = linear_map(x, x + x @ low + 2, 4, ridge=1e-9)  # rank 3, and a constant
    torch.testing.assert_close(exact(x), x + x @ low + 2, rtol=1e-3, atol=1e-3)
    errors = [(linear_map(x, x + x @ low + 2, rank)(x) - x - x @ low - 2).square().mean() for rank in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True) and errors[1] > 100 * errors[2]


def test_scores(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "SETS", 40)
    monkeypatch.setattr(scores, "STEPS", 20)
    rows = {row["estimator"]: row for row in table(trained, scores)}
    assert {"sensitivity", "block_influence", "taylor", "DLR from the prior", "DLR from zero", "random"} <= rows.keys()
    for row in rows.values():
        assert all(abs(float(row[name])) <= 1 or math.isnan(float(row[name])) for name in ("layers", "sets"))
    truth = rows["true cost of each layer alone"]
    assert float(truth["sets by cost"]) == pytest.approx(1)  # sets of one, of four layers


def test_true_cost_is_the_loss_of_replacing_a_set() -> None:
    model = tiny_model("llama")
    blocks = torch.randint(1, 256, (4, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    costs = scores.true_costs(model, new_harmonizers(model.config, 8, seed=0), [[], [0], [0, 1, 2, 3]], blocks)
    assert costs[0] == 0 and costs[1] != 0 and costs[2] != costs[1]


def outcome(gap: float, recovery: float | None, *, gained: float = 0.2) -> dict[str, float | None]:
    """One task's figures as DVC shows them, each accuracy with a standard error of 0.03."""
    figures = {"gap.acc": gap, "recovery.acc": recovery}
    errors = {"plug_in.acc_stderr": 0.03, "emulator_finetune.acc_stderr": 0.03}
    own = {f"adapters.layers.{key}": value for key, value in {**figures, **errors}.items()}
    shared = {"zero_shot.acc": 0.3, "full_finetune.acc": 0.3 + gained}
    return {f"tasks.piqa.{key}": value for key, value in {**own, **shared}.items()}


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
    study = runpy.run_path(str(ROOT / "studies/sweep.py"))

    def row(changes: dict[str, float]) -> dict[str, float]:
        figures = {f"{n}.{m}": 0.5 - 0.1 * changes["alpha"] for n in ("gap", "recovery") for m in ("acc", "answer_nll")}
        for name in ("plug_in", "emulator_finetune"):
            figures |= {f"{name}.{m}{e}": 0.1 for m in ("acc", "answer_nll") for e in ("", "_stderr")}
        row = {f"tasks.{task}.adapters.layers.{key}": v for task in ("a", "b") for key, v in figures.items()}
        return row | {"emulator.share_of_model": 0.7, "corpus_perplexity.emulator": 50.0}

    grid = [(alpha, beta) for alpha in study["ALPHAS"] for beta in study["BETAS"]]
    settings = [study["setting"](*at) for at in grid]
    assert len({study["name_of"](changes) for changes in settings}) == len(grid) - len(study["BETAS"]) + 1
    rows = [
        {"alpha": a, "beta": b, **study["row_figures"](row(changes), ["a", "b"])}
        for (a, b), changes in zip(grid, settings, strict=True)
    ]
    assert rows[0]["gap acc"] == pytest.approx(0.5) and rows[0]["gap acc ±"] == pytest.approx((4 * 0.01) ** 0.5 / 2)
    unfit = {"tasks.a.adapters.layers.recovery.acc": None}  # full fine-tuning gained nothing
    none = study["row_figures"](row(settings[0]) | unfit, ["a", "b"])
    assert math.isnan(none["recovery acc"]) and none["gap acc"] == 0.5
    study["draw"](tmp_path / "dial.png", [*rows[1:], {**rows[0], **none}])
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")


# --- methods against each other --------------------------------------------------------------------------


@pytest.fixture
def compare_study() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "studies/compare.py"))


def measured_by(gap: float, recovery: float | None, tokens: int = 7) -> dict[str, Any]:
    """metrics.json of a run, with the figures that matter; each stage costs 1 s more than the one before."""
    whole, plugged = 0.0 if recovery is None else 1.0, recovery or 0.0  # of what there is to gain
    gained = {name: 0.0 for name in MEASUREMENTS} | {"full_finetune": whole, "plug_in": plugged}
    figures: dict[str, Any] = {name: {"acc": 0.5 + g / 10, "answer_nll": 3.0 - g} for name, g in gained.items()}
    own = {name: figures.pop(name) for name in ("emulator_finetune", "plug_in")}
    own["gap"] = {"acc": gap, "answer_nll": gap}
    better = {**own, "gap": {"acc": 2 * gap, "answer_nll": gap}}
    task: dict[str, Any] = {**figures, "adapters": {"layers": own, "lora": better}}
    cost = {
        stage: {"tokens": tokens, "seconds": float(i), "peak_memory_mib": 100 * i}
        for i, stage in enumerate(("layer_importance", "train_harmonizers", "compress"), start=1)
    }
    return {
        "tasks": {"a": task, "b": task},
        "emulator": {"share_of_model": 0.7},
        "corpus_perplexity": {"emulator": 90.0},
        "cost": cost,
    }


def test_comparison_has_means_errors_costs_and_the_best(compare_study: dict[str, Any]) -> None:
    runs = {
        "uniform": [measured_by(0.1, 0.5), measured_by(0.2, 0.7)],
        "scaleot": [measured_by(0.3, 0.5), measured_by(0.3, None)],
        "scaleot, channels": [measured_by(0.2, 0.5)],
    }
    columns = compare_study["COLUMNS"]
    rows = compare_study["rows_of"](
        {
            row: [compare_study["run_figures"](metrics, row.partition(",")[0]) for metrics in found]
            for row, found in runs.items()
        }
    )
    assert rows["uniform"]["gap acc"] == pytest.approx((0.15, 0.05)) and rows["scaleot"]["gap acc"] == (0.3, 0.0)
    assert rows["uniform, lora"]["gap acc"] == pytest.approx((0.3, 0.1)) and len(rows) == 6
    assert rows["scaleot"]["recovery acc"] is None  # full fine-tuning gained nothing with one seed
    assert (rows["uniform"]["seconds"][0], rows["scaleot"]["seconds"][0]) == (3.0, 6.0)
    assert (rows["uniform"]["tokens"][0], rows["scaleot"]["tokens"][0]) == (7, 21)
    assert rows["scaleot"]["MiB"][0] == 300 and rows["scaleot, channels"]["seconds"][0] == 6.0
    unlike = measured_by(0.1, 0.5)
    unlike["tasks"]["b"] = measured_by(0.1, None)["tasks"]["b"]  # has nothing to gain, and divides nothing
    assert columns["recovery acc"][0](of_kind(unlike, "lora"), "uniform") == pytest.approx(0.5)
    assert columns["recovery nll"][0](of_kind(unlike, "lora"), "uniform") == pytest.approx(0.5)
    best = compare_study["best"]
    assert best(rows, "gap acc") == "scaleot, lora" and best(rows, "seconds") == "uniform"
    assert best(rows, "recovery acc") == "uniform" and best(rows, "share of bytes") is None


@pytest.fixture
def compared(
    compare_study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[dict[str, Any]]]:
    """The comparison in a folder of its own, without DVC: a call makes it and gives what it ran."""
    around = compare_study["main"].__globals__
    made: list[dict[str, Any]] = []
    monkeypatch.setitem(around, "run", lambda name, changes: made.append(changes) or {"rev": name})
    monkeypatch.setitem(around, "read_metrics", lambda row: measured_by(0.1, None))
    monkeypatch.setattr("sys.argv", ["compare.py", "data.eval_questions=20"])
    for name in ("params.yaml", "dvc.yaml", "embedded.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("scaleot_core", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("before\n<!-- compare -->\nold\n<!-- end of compare -->\nafter\n")
    monkeypatch.chdir(tmp_path)

    def call() -> list[dict[str, Any]]:
        made.clear()
        compare_study["main"]()
        return list(made)

    return call


def test_comparison_runs_all_methods_with_all_seeds_and_writes_its_table(
    compare_study: dict[str, Any], compared: Callable[[], list[dict[str, Any]]]
) -> None:
    made = compared()
    log = Path("docs/results.md").read_text()
    assert log.startswith("before\n<!-- compare -->\n| means of piqa") and log.endswith(
        "<!-- end of compare -->\nafter\n"
    )
    lines = [line.strip("| ").split(" | ") for line in log.splitlines() if line.startswith("|")]
    told = {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
    assert "old" not in log and len(told) == 14
    assert told["uniform"]["gap acc"] == "0.100 ± 0.000" and told["uniform, lora"]["gap acc"] == "**0.200 ± 0.000**"
    assert {(c["method"], c.get("channel_pruning.ratio", 0), c["seed"]) for c in made} == {
        (method, cut, seed)
        for method, cut in [
            *((m, 0) for m in ("uniform", "distilled", "crash", "gradot", "scaleot")),
            *(("scaleot", share) for share in (0.51, 0.7)),
        ]
        for seed in (0, 1, 2)
    }
    assert all(c["data.eval_questions"] == 20 and c["offsite_tune.lr"] == [1e-4, 3e-4] for c in made)
    Path("docs/results.md").write_text("no marks")
    with pytest.raises(UserError, match="marks"):
        compare_study["write_log"]({}, "x")


def test_comparison_goes_on_from_the_runs_that_are_there(
    compared: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, log = Path("docs/studies/compare-runs.csv"), Path("docs/results.md")
    compared()
    whole, table = runs.read_text(), log.read_text()
    runs.write_text("".join(whole.splitlines(keepends=True)[:-2]))  # stopped before the last two runs
    again = compared()
    assert [(c["method"], c["seed"]) for c in again] == [("scaleot", 2), ("scaleot", 2)]
    assert runs.read_text() == whole and log.read_text() == table
    for name in ("scaleot_core/reporting/figures.py", "scaleot_core/cli/output.py"):  # on which no figure depends
        Path(name).write_text("")
    assert not compared()
    monkeypatch.setattr("sys.argv", ["compare.py", "data.eval_questions=30"])
    assert len(compared()) == 21 and "data.eval_questions=30 |" in log.read_text()
    monkeypatch.setattr("sys.argv", ["compare.py", "data.eval_questions=20"])
    assert not compared()  # both are kept
    for name in ("scaleot_core/methods/gradot.py", "stages/compress.py", "embedded.lock"):
        with Path(name).open("a") as stream:
            stream.write("# another\n")
        assert len(compared()) == 21


def test_code_that_is_changed_while_a_study_runs_is_told(
    compare_study: dict[str, Any], compared: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made may be of either code."""
    monkeypatch.setitem(
        compare_study["main"].__globals__, "run", lambda name, own: Path("stages/compress.py").write_text("")
    )
    with pytest.raises(UserError, match=r"compare-runs\.csv: the code was changed while compare-uniform-seed-0"):
        compared()
    assert not Path("docs/studies/compare-runs.csv").exists()


def test_code_is_what_a_stage_or_a_pipeline_depends_on_and_nothing_that_stages_make() -> None:
    with chdir(ROOT):
        attack, studies = code("studies/dvc.yaml:attack"), code("studies/dvc.yaml")
    assert {Path("stages/attack.py"), Path("scaleot_core/attacks/restoration.py")} < {*attack} < {*studies}
    assert Path("scaleot_core/evaluation/lm_tasks/commonsense_qa_cloze.yaml") in attack
    assert Path("studies/scores.py") in {*studies} - {*attack}
    assert all(path.is_file() and path.parts[0] in {"scaleot_core", "stages", "studies"} for path in studies)


def test_attacks_are_over_the_dial_over_channels_and_on_the_variants() -> None:
    study = runpy.run_path(str(ROOT / "studies/attacks.py"))
    swept = {"alphas": [0.5, 1.0], "betas": [0.0, 0.8], "channels": [0.75], "variants": {"ends": {"alpha": 0.25}}}
    assert study["settings"](swept) == {
        "alpha 0.5 beta 0.0": ("β = 0, over α", 0.5, {"alpha": 0.5, "beta": 0.0}),
        "alpha 1.0 beta 0.0": ("β = 0, over α", 1.0, {"alpha": 1.0, "beta": 0.0}),  # and no layer is left for β
        "alpha 0.5 beta 0.8": ("β = 0.8, over α", 0.5, {"alpha": 0.5, "beta": 0.8}),
        "channels 0.75": (
            "channels alone, over their share cut",
            0.75,
            {"alpha": 0.0, "beta": 0.0, "channel_pruning.ratio": 0.75},
        ),
        "ends": ("ends", "", {"alpha": 0.25}),
    }
    for name in ("attacks", "private"):
        swept = yaml.safe_load((ROOT / f"studies/{name}.yaml").read_text())
        for _, _, changes in study["settings"](swept).values():
            changed(load_params(ROOT / "params.yaml"), {**swept["changes"], **changes})


def test_study_of_attacks_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["attacks.py", "other"])
    assert "`attacks` and `private` are there" in refusal(runpy.run_path(str(ROOT / "studies/attacks.py"))["main"])


# --- presets and the table -------------------------------------------------------------------------------


@pytest.fixture
def table_study(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    return runpy.run_path("studies/table.py")


def test_every_preset_changes_parameters_to_allowed_values(table_study: dict[str, Any], params: Params) -> None:
    papers = ("gpt2-xl", "opt-1.3b", "opt-6.7b", "llama-7b")
    recommended = changed(params, table_study["preset"]("recommended", []))
    assert recommended.alpha == recommended.beta == recommended.adapter_layers == 0 and recommended.adapters == ["lora"]
    secret = changed(params, table_study["preset"]("recommended-secret", []))
    cut = secret.channel_pruning.model_copy(update={"ratio": recommended.channel_pruning.ratio})
    assert secret.model_copy(update={"channel_pruning": cut}) == recommended != secret
    for name in (*papers, "nine-tasks"):
        row = changed(params, table_study["preset"](name, []))
        assert len(row.tasks) == 9 and row.data.questions == "hub"
        if name in papers:
            assert row.data.block_size == 512 and row.adapter_layers == 4 and len(row.offsite_tune.lr) == 5
            assert row.harmonizer.rank == (256 if name in ("opt-6.7b", "llama-7b") else 64)


def test_setting_stands_above_the_preset(table_study: dict[str, Any]) -> None:
    changes = table_study["preset"]("opt-1.3b", ["alpha=0.5", "tasks=[piqa]"])
    assert changes["alpha"] == 0.5 and changes["tasks"] == ["piqa"] and changes["harmonizer.rank"] == 64


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("opt-13b", [], "no preset is named 'opt-13b'; there are gpt2-xl, opt-1.3b"),
        (".paper", [], "no preset is named"),
        ("opt-1.3b", ["alpha"], "'alpha': a setting is KEY=VALUE"),
        ("opt-1.3b", ["alpha=2"], "alpha = 2: .* the range is 0 to 1"),
        ("opt-1.3b", ["dlr.alpha=2"], "dlr.alpha is no parameter"),
        ("opt-1.3b", ["nothing.alpha=2"], "nothing.alpha is no parameter"),
    ],
)
def test_mistake_in_a_preset_is_told_before_the_run(
    table_study: dict[str, Any], name: str, settings: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        table_study["preset"](name, settings)


@pytest.fixture
def made_up_runs(table_study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the table's runs were given, by name; the figures of seed s are those of seed 0 and s more."""
    ran: dict[str, Any] = {}

    def read_metrics(changes: dict[str, Any]) -> dict[str, Any]:
        seed = changes.get("seed", 0)
        figures = {"acc": 0.5 + seed, "acc_stderr": 0.01, "answer_nll": 3.0 + seed, "answer_nll_stderr": 0.1}
        five = {name: figures for name in MEASUREMENTS}
        told = {"metrics": ["acc", "answer_nll"], "lower_is_better": ["answer_nll"], "lr": {}}
        tasks = {task: task_of(layers=five | told) for task in ("piqa", "sciq")}
        kept = {"emulator": {"share_of_model": 0.7}, "corpus_perplexity": {"model": 20.0, "emulator": 90.0}}
        return kept | {"tasks": tasks}

    def run(name: str, changes: dict[str, Any]) -> dict[str, Any]:
        ran[name] = changes
        return changes

    around = table_study["main"].__globals__
    monkeypatch.setitem(around, "run", run)
    monkeypatch.setitem(around, "read_metrics", read_metrics)
    for name in ("presets.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return ran


def figures_of(name: str) -> dict[tuple[str, ...], tuple[str, str]]:
    with Path("docs", "studies", f"{name}.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {(row["task"], row["measurement"], row["metric"]): (row["value"], row["standard error"]) for row in rows}


def test_table_has_the_five_measurements_of_every_task(
    table_study: dict[str, Any], made_up_runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["table.py", "nine-tasks", "alpha=0.5"])
    table_study["main"]()
    ((name, changes),) = made_up_runs.items()
    assert name == "table-nine-tasks-alpha-0.5" and changes["alpha"] == 0.5
    figures = figures_of(name)
    assert len(figures) == 2 * (5 + 2) * 2  # tasks, measurements with gap and recovery, metrics
    assert figures["piqa", "zero_shot", "acc"] == ("0.5", "0.01")


def test_table_of_several_seeds_has_means_and_their_standard_errors(
    table_study: dict[str, Any], made_up_runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["table.py", "recommended", "SEEDS=0,2"])
    table_study["main"]()
    assert list(made_up_runs) == ["table-recommended-seed-0", "table-recommended-seed-2"]
    assert [changes["seed"] for changes in made_up_runs.values()] == [0, 2]
    figures = figures_of("table-recommended")
    assert figures["sciq", "zero_shot", "answer_nll"] == ("4.0", "1.0")
    assert figures["sciq", "recovery, layers", "acc"] == ("", "")  # undefined in one of them
    monkeypatch.setattr("sys.argv", ["table.py", "recommended", "SEEDS=0,two"])
    with pytest.raises(UserError, match="SEEDS=0,two: seeds are whole numbers"):
        table_study["main"]()
