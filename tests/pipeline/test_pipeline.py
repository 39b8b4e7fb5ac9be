"""The whole pipeline by DVC, on a tiny model: what a run leaves behind, and what another α runs again."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from helpers import CPU, ROOT, write_project
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scaleot_core.common.files import read_csv, read_jsonl
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.exchange.package import Package
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.reporting.measurements import by_row, five
from studies import experiments

SOURCES = "sources"  # runs each time: it looks whether what the user brought has changed
UPSTREAM = ["prepare_data", "layer_importance", "train_harmonizers", "zero_shot@piqa", "full_finetune@piqa"]
DOWNSTREAM = ["compress", "offsite_tune@piqa-layers", "offsite_tune@piqa-lora", "evaluate"]  # what α decides
STAGES = sorted(UPSTREAM + DOWNSTREAM)
MEASUREMENTS = ["zero_shot", "full_finetune", "emulator_zero_shot", "emulator_finetune", "plug_in"]

pytestmark = pytest.mark.timeout(1800)  # the fixture: fifteen processes, each with seconds of imports


class Sweep(NamedTuple):
    """What DVC said at each command, and the folder as it was after the first run and after the experiment."""

    first: str
    again: str
    changed: str
    diff: dict[str, Any]
    shown: list[Any]
    back: str
    at_first: Path
    at_changed: Path
    at_back: Path
    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, warm_bin: Path) -> Sweep:
    """One repository: the run, the run again by a cold DVC, α = 0.5 as an experiment, and back to the first α."""
    base = tmp_path_factory.mktemp("sweep")
    folder = base / "project"
    folder.mkdir()
    write_project(folder, tokenizer, adapters=["layers", "lora"])
    cold = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {
        "PATH": f"{warm_bin}{os.pathsep}{cold}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(base / "site"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")} | given

    def call(*command: str, plain: bool = False, **changes: str) -> str:
        """All that a command prints, or its plain output alone."""
        stderr, changed = subprocess.PIPE if plain else subprocess.STDOUT, environment | changes
        done = subprocess.run(command, cwd=folder, env=changed, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def keep(name: str) -> Path:
        return Path(shutil.copytree(folder, base / name, ignore=shutil.ignore_patterns(".git", ".dvc", "tiny-*")))

    call("git", "init", "--quiet")
    call("git", "config", "user.name", "tester")
    call("git", "config", "user.email", "tester@example.com")
    call("dvc", "init", "--quiet")
    call("git", "add", "--all")
    call("git", "commit", "--quiet", "--message", "project")
    first = call("dvc", "repro")
    at_first = keep("first")
    call("git", "add", "--all")
    call("git", "commit", "--quiet", "--message", "first run")
    again = call("dvc", "repro", PATH=cold)
    changed = call("dvc", "exp", "run", "--set-param", "alpha=0.5")
    at_changed = keep("changed")
    diff = json.loads(call("dvc", "metrics", "diff", "--json", plain=True))
    shown = json.loads(call("dvc", "exp", "show", "--json", plain=True))
    back = call("dvc", "exp", "run", "--set-param", "alpha=0.25")
    return Sweep(first, again, changed, diff, shown, back, at_first, at_changed, keep("back"), folder, environment)


@pytest.fixture(scope="module")
def metrics(sweep: Sweep) -> dict[str, Any]:
    return read_metrics(sweep.at_first)


def read_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def stages_that(did: str, output: str) -> list[str]:
    """Stages that DVC says it ran, didn't have to look at, or took out of its cache, sorted."""
    line = {
        "ran": r"Running stage '(.+)'",
        "rested": r"Stage '(.+)' didn't change",
        "cached": r"Stage '(.+)' is cached",
    }
    return sorted(re.findall(line[did], output))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_every_stage_runs(sweep: Sweep) -> None:
    assert stages_that("ran", sweep.first) == sorted([*STAGES, SOURCES])


def test_nothing_changed_means_nothing_to_do(sweep: Sweep) -> None:
    assert stages_that("ran", sweep.again) == [SOURCES]
    assert stages_that("rested", sweep.again) == STAGES


def test_five_measurements_with_their_errors(metrics: dict[str, Any]) -> None:
    assert list(metrics["tasks"]) == ["piqa"]
    measurements = by_row(metrics["tasks"]["piqa"])
    assert len(measurements) == 7
    for measured in measurements.values():
        assert 0 <= measured["acc"] <= 1 and measured["answer_nll"] > 0
        assert 0 < measured["acc_stderr"] < 0.2 and measured["answer_nll_stderr"] > 0
        assert measured["questions"] == 20 and measured["version"] == 1


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_gap_and_recovery(metrics: dict[str, Any], kind: str) -> None:
    piqa = five(metrics["tasks"]["piqa"], kind)
    for metric, sign in (("acc", 1), ("acc_norm", 1), ("answer_nll", -1)):
        start, ceiling, _, tuned, plugged = (sign * piqa[name][metric] for name in MEASUREMENTS)
        assert piqa["gap"][metric] == pytest.approx(plugged - tuned)
        expected = pytest.approx((plugged - start) / (ceiling - start)) if ceiling > start else None
        assert piqa["recovery"][metric] == expected
    assert piqa["recovery"]["answer_nll"] is not None  # full fine-tuning did lower it


def test_sizes_are_those_of_the_files(sweep: Sweep, metrics: dict[str, Any]) -> None:
    on_disk = {
        name: sum(file.stat().st_size for file in (sweep.at_first / "artifacts" / name).glob("*.safetensors"))
        for name in ("emulator", "model")
    }
    size = metrics["emulator"]
    assert (size["bytes"], size["model_bytes"]) == (on_disk["emulator"], on_disk["model"])
    assert size["share_of_model"] == pytest.approx(on_disk["emulator"] / on_disk["model"])
    assert 0 < size["share_of_model"] < 1
    assert [size[f"{kind}_layers"] for kind in ("adapter", "harmonizer", "compressed")] == [1, 1, 2]


def test_perplexity_of_both_on_held_out_text(sweep: Sweep, metrics: dict[str, Any]) -> None:
    artifacts = sweep.at_first / "artifacts"
    blocks = load_file(artifacts / "corpus" / "heldout.safetensors")["blocks"].long()
    whole = load_model(artifacts / "model", device=CPU, dtype=torch.float32)
    shipped = Package(artifacts / "emulator").load(CPU)
    for name, model in (("model", whole), ("emulator", shipped)):
        loss = model(input_ids=blocks, labels=blocks).loss
        assert metrics["corpus_perplexity"][name] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert metrics["corpus_perplexity"]["model"] != metrics["corpus_perplexity"]["emulator"]


def test_cost_of_every_stage(metrics: dict[str, Any]) -> None:
    assert sorted(metrics["cost"]) == sorted(stage.replace("@", "-") for stage in STAGES)
    assert all(cost["seconds"] >= 0 and cost["peak_memory_mib"] > 50 for cost in metrics["cost"].values())
    assert metrics["cost"]["evaluate"]["seconds"] > 0


def test_versions_and_whose_splits_stand_beside_the_figures(metrics: dict[str, Any]) -> None:
    assert metrics["versions"]["lm_eval"] == version("lm_eval")
    assert "prepare_data" in metrics["splits"] and "not comparable" in metrics["splits"]


def test_pictures_and_tables_of_the_curves(sweep: Sweep) -> None:
    plots = sweep.at_first / "plots"
    assert sorted(file.stem for file in plots.glob("*.png")) == ["curves", "layers", "measurements"]
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in plots.glob("*.png"))
    lengths = {"layer_importance": 20, "train_harmonizers": 10, "offsite_tune@piqa-layers": 10, "full_finetune@piqa": 5}
    lengths["offsite_tune@piqa-lora"] = 10
    assert {file.stem for file in (plots / "loss").iterdir()} == lengths.keys()
    for stage, count in lengths.items():
        with (plots / "loss" / f"{stage}.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [int(row["step"]) for row in rows] == list(range(count))
        assert all(float(row["loss"]) > 0 for row in rows)
    scores = json.loads((sweep.at_first / "artifacts" / "harmonizers" / "scores.json").read_text())
    with (plots / "layers.csv").open(newline="") as stream:
        layers = list(csv.DictReader(stream))
    assert [float(row["score"]) for row in layers] == scores["scores"]
    assert [float(row["prior"]) for row in layers] == scores["prior"]


def test_another_alpha_runs_only_what_hangs_on_it(sweep: Sweep) -> None:
    assert stages_that("ran", sweep.changed) == sorted([*DOWNSTREAM, SOURCES])
    assert stages_that("rested", sweep.changed) == sorted(UPSTREAM)


def test_another_alpha_changes_the_emulator_and_no_baseline(sweep: Sweep, metrics: dict[str, Any]) -> None:
    changed = read_metrics(sweep.at_changed)
    assert changed["emulator"]["harmonizer_layers"] == 2 and changed["emulator"]["compressed_layers"] == 1
    assert changed["emulator"]["bytes"] < metrics["emulator"]["bytes"]
    before, after = (by_row(found["tasks"]["piqa"]) for found in (metrics, changed))
    for name in before:
        same = after[name] == before[name]
        assert same == (name in ("zero_shot", "full_finetune")), name


def test_metrics_diff_shows_what_changed(sweep: Sweep) -> None:
    changed = sweep.diff["metrics.json"]
    assert changed["emulator.harmonizer_layers"] == {"old": 1, "new": 2, "diff": 1}
    assert changed["emulator.bytes"]["diff"] < 0
    assert {"tasks.piqa.adapters.lora.plug_in.answer_nll", "corpus_perplexity.emulator"} <= changed.keys()
    assert not [key for key in changed if "full_finetune" in key or "zero_shot" in key.replace("emulator_zero", "")]


def test_experiments_are_listed_with_their_alpha_and_metrics(sweep: Sweep) -> None:
    (committed,) = (entry for entry in sweep.shown if entry["rev"] != "workspace")
    (experiment,) = (found for group in committed["experiments"] for found in group["revs"])
    seen = []
    for entry in (committed, experiment):
        data = entry["data"]
        layers = data["metrics"]["metrics.json"]["data"]["emulator"]["harmonizer_layers"]
        seen.append((data["params"]["params.yaml"]["data"]["alpha"], layers))
    assert seen == [(0.25, 1), (0.5, 2)]


def test_first_alpha_again_comes_out_of_the_cache(sweep: Sweep) -> None:
    assert stages_that("ran", sweep.back) == [SOURCES]
    assert stages_that("cached", sweep.back) == sorted(DOWNSTREAM)
    assert yaml.safe_load((sweep.at_back / "params.yaml").read_text())["alpha"] == 0.25
    assert read_metrics(sweep.at_back) == read_metrics(sweep.at_first)
    for name in ("artifacts", "plots"):
        first, back = (
            {file.relative_to(at): file.read_bytes() for file in (at / name).rglob("*") if file.is_file()}
            for at in (sweep.at_first, sweep.at_back)
        )
        assert first == back and first


def test_adapter_layers_and_nothing_else_come_back_changed(sweep: Sweep) -> None:
    artifacts = sweep.at_first / "artifacts"
    manifest = Package(artifacts / "emulator").manifest  # raises where any file isn't as compress wrote it
    shipped = tensors(artifacts / "emulator")
    returned = load_file(artifacts / "adapters" / "piqa" / "layers" / "adapter" / "adapter.safetensors")
    whole = tensors(artifacts / "model")
    adapters = [f"model.layers.{i}." for i, kind in enumerate(manifest.layers) if kind == "adapter"]
    assert returned.keys() == {name for name in whole if name.startswith(tuple(adapters))}
    for name, tensor in returned.items():
        assert torch.equal(shipped[name], whole[name]), name
        assert not torch.equal(tensor, whole[name]), name


def test_evaluated_models_are_the_tuned_ones(sweep: Sweep, metrics: dict[str, Any]) -> None:
    """Both are put together here by hand and scored again: the figures must be those of metrics.json."""
    artifacts, piqa = sweep.at_first / "artifacts", five(metrics["tasks"]["piqa"], "layers")
    returned = load_file(artifacts / "adapters" / "piqa" / "layers" / "adapter" / "adapter.safetensors")
    questions = {"piqa": read_jsonl(artifacts / "tasks" / "piqa" / "eval.jsonl")}
    shipped = Package(artifacts / "emulator").load(CPU)
    whole = load_model(artifacts / "model", device=CPU, dtype=torch.float32)
    parts: dict[str, tuple[PreTrainedModel, Path]] = {
        "emulator_finetune": (shipped, artifacts / "emulator"),
        "plug_in": (whole, artifacts / "model"),
    }
    for name, (model, folder) in parts.items():
        model.load_state_dict(returned, strict=False)
        expected = tensors(folder) | returned
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items()), name
        scored = evaluate(model, load_tokenizer(artifacts / "model"), questions, batch_size=32, label=name)
        assert scored["piqa"] == pytest.approx(piqa[name], rel=1e-5), name
    for untuned, tuned in (("emulator_zero_shot", "emulator_finetune"), ("zero_shot", "plug_in")):
        assert piqa[untuned]["answer_nll"] != pytest.approx(piqa[tuned]["answer_nll"], rel=1e-5)


@pytest.fixture
def inside(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sweep's repository, with its environment and no patience to poll."""
    for name, value in sweep.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(sweep.folder)


@pytest.mark.usefixtures("inside")
def test_experiments_are_made_once_and_leave_the_project_as_it_is(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds experiments to the repository, as those do that follow."""
    changes = {"half-of-beta": {"beta": 0.4}, "more-alpha": {"alpha": 0.9}}
    before = {name: (sweep.folder / name).read_bytes() for name in ("params.yaml", "dvc.lock", "metrics.json")}
    monkeypatch.setattr(experiments, "workers", lambda: 2)
    runs = experiments.run_all(changes, "test")
    assert before == {name: (sweep.folder / name).read_bytes() for name in before}
    sizes = [runs[name].metrics["emulator"]["bytes"] for name in ("more-alpha", "half-of-beta")]
    assert sizes[0] < read_metrics(sweep.at_first)["emulator"]["bytes"] < sizes[1]
    monkeypatch.setattr(experiments, "_Pool", lambda jobs: pytest.fail("it ran again"))
    assert experiments.run_all(changes, "test") == runs


def test_two_clones_share_finished_stages_and_experiments(sweep: Sweep, tmp_path: Path) -> None:
    """Through a remote for DVC and one for git, as the README says; the second clone runs nothing that was run."""

    def call(folder: Path, *command: str) -> str:
        environment = sweep.environment | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    one, two = Path(shutil.copytree(sweep.folder, tmp_path / "one")), tmp_path / "two"
    call(tmp_path, "git", "init", "--bare", "--quiet", "remote.git")
    call(one, "git", "checkout", "--quiet", "--force", "HEAD")
    call(one, "git", "remote", "add", "origin", str(tmp_path / "remote.git"))
    call(one, "dvc", "remote", "add", "--default", "shared", str(tmp_path / "store"))
    call(one, "git", "commit", "--quiet", "--all", "--message", "a remote")
    call(one, "git", "push", "--quiet", "origin", "HEAD:main")
    call(one, "dvc", "checkout")
    call(one, "dvc", "push", "--run-cache")
    call(one, "dvc", "exp", "run", "--temp", "--name", "shared-alpha", "--set-param", "alpha=0.5")
    call(one, "dvc", "push", "--run-cache")
    call(one, "dvc", "exp", "push", "origin", "shared-alpha")

    call(tmp_path, "git", "clone", "--quiet", "--branch", "main", str(tmp_path / "remote.git"), "two")
    call(two, "git", "config", "user.name", "other")
    call(two, "git", "config", "user.email", "other@example.com")
    call(two, "dvc", "pull", "--run-cache")
    assert stages_that("ran", call(two, "dvc", "repro")) == [SOURCES]
    call(two, "dvc", "exp", "pull", "origin", "shared-alpha")
    assert "shared-alpha" in call(two, "dvc", "exp", "list")
    again = call(two, "dvc", "exp", "run", "--set-param", "alpha=0.5")
    assert stages_that("ran", again) == ["evaluate", SOURCES]  # metrics.json is in git, not in the cache
    assert set(stages_that("cached", again)) == {*DOWNSTREAM} - {"evaluate"}
    assert read_metrics(two)["emulator"] == read_metrics(sweep.at_changed)["emulator"]


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_stages_read_what_dvc_links_to_its_cache_and_pack_ships_the_files_themselves(
    sweep: Sweep, tmp_path: Path, kind: str
) -> None:
    """`cache.type`, which DVC recommends for large files and shared caches."""
    folder = Path(shutil.copytree(sweep.folder, tmp_path / "project", symlinks=True))

    def call(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, env=sweep.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}"
        return done.stdout

    call("dvc", "config", "cache.type", kind)
    call("dvc", "checkout", "--relink")
    linked = [
        file for file in (folder / "artifacts/emulator").iterdir() if file.is_symlink() or file.stat().st_nlink > 1
    ]
    assert {file.name for file in linked} >= {"manifest.json", "base.safetensors", "tokenizer_config.json"}
    done = call("dvc", "repro", "--force", "--single-item", "offsite_tune@piqa-layers", "evaluate")
    assert stages_that("ran", done) == ["evaluate", "offsite_tune@piqa-layers"]
    call("python", "-m", "scaleot_core.cli", "pack", "--out", str(tmp_path / "shipped"))
    assert not [file for file in (tmp_path / "shipped").iterdir() if file.is_symlink() or file.stat().st_nlink > 1]
    assert Package(tmp_path / "shipped").plan
    assert (tmp_path / "shipped.private.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("inside")
def test_attacks_over_the_dial(sweep: Sweep) -> None:
    """The pipeline and the attack in one experiment a setting; the last here, since it changes the repository."""
    shutil.copytree(
        ROOT / "studies", sweep.folder / "studies", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
    )
    settings = yaml.safe_load((sweep.folder / "studies/attacks.yaml").read_text())
    small = {
        "tasks": ["piqa"],
        "adapter_layers": 1,
        "attack.steps": 4,
        "attack.eval_points": 1,
        "attack.membership_records": 10,
    }
    settings |= {"alphas": [0.5], "betas": [0.8], "channels": [], "variants": {}, "seeds": [0, 1]}
    settings["changes"] |= small | {"attack.membership_records": 10}
    (sweep.folder / "studies/attacks.yaml").write_text(yaml.safe_dump(settings))
    for command in (("add", "studies"), ("commit", "--quiet", "--message", "studies")):
        subprocess.run(["git", *command], check=True)
    done = subprocess.run(["python", "studies/attacks.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(sweep.folder / "docs/studies/attacks.csv")
    assert [row["adapters"] for row in rows] == ["layers", "lora"]
    assert rows[0]["line"] == "β = 0.8, over α" != rows[1]["line"]
    for row in rows:
        assert (row["alpha"], row["beta"], row["channels"]) == (0.5, 0.8, 0.0)
        assert all(
            isinstance(row[name], float) for name in ("remaining gap", "remaining gap ±", "gap acc", "membership AUC")
        )
        assert 0 < row["bytes exact"] < 1 and row["bytes exact ±"] == 0
    assert (sweep.folder / "docs/studies/attacks.png").stat().st_size > 10_000


def test_no_stage_of_any_run_or_study_here_was_computed_twice(sweep: Sweep) -> None:
    """DVC keeps what a stage wrote under what it read; the seconds in costs/*.json tell one run from another."""
    runs = {key.name: [run.name for run in key.iterdir()] for key in sweep.folder.glob(".dvc/cache/runs/*/*")}
    assert len(runs) > len(STAGES)
    assert {key: found for key, found in runs.items() if len(found) > 1} == {}
