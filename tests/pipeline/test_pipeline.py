"""The whole pipeline by DVC, on a tiny model: what a run leaves behind, and what another α runs again."""

import hashlib
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

from scaleot_core.common.files import folder_bytes, read_csv, read_jsonl
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


class Repository(NamedTuple):
    """A project in git and DVC, and the environment of its commands."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, folder: Path | None = None, plain: bool = False) -> str:
        """Return all that a command prints, or its plain output alone."""
        done = subprocess.run(
            command,
            cwd=folder or self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if plain else subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


class Sweep(NamedTuple):
    """What DVC said at each command, and the folder as it was after the first run and after the experiment."""

    repository: Repository
    first: str
    again: str
    changed: str
    diff: dict[str, Any]
    shown: list[Any]
    back: str
    at_first: Path
    at_changed: Path
    at_back: Path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Sweep:
    """Run in one repository: the pipeline, the same again, α = 0.5 as an experiment, and the first α again."""
    base = tmp_path_factory.mktemp("sweep")
    folder = base / "project"
    folder.mkdir()
    write_project(folder, tokenizer, adapters=["layers", "lora"])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(base / "site"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    repository = Repository(folder, environment)
    call = repository.call

    def copied(name: str) -> Path:
        return Path(shutil.copytree(folder, base / name, ignore=shutil.ignore_patterns(".git", ".dvc", "tiny-*")))

    call("git", "init", "--quiet")
    call("git", "config", "user.name", "tester")
    call("git", "config", "user.email", "tester@example.com")
    call("dvc", "init", "--quiet")
    call("git", "add", "--all")
    call("git", "commit", "--quiet", "--message", "project")
    first = call("dvc", "repro")
    at_first = copied("first")
    call("git", "add", "--all")
    call("git", "commit", "--quiet", "--message", "first run")
    again = call("dvc", "repro")
    changed = call("dvc", "exp", "run", "--set-param", "alpha=0.5")
    at_changed = copied("changed")
    diff = json.loads(call("dvc", "metrics", "diff", "--json", plain=True))
    shown = json.loads(call("dvc", "exp", "show", "--json", plain=True))
    back = call("dvc", "exp", "run", "--set-param", "alpha=0.25")
    return Sweep(repository, first, again, changed, diff, shown, back, at_first, at_changed, copied("back"))


def read_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def metrics(sweep: Sweep) -> dict[str, Any]:
    return read_metrics(sweep.at_first)


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


def test_five_measurements_with_their_errors_and_versions(metrics: dict[str, Any]) -> None:
    assert list(metrics["tasks"]) == ["piqa"]
    measurements = by_row(metrics["tasks"]["piqa"])
    assert len(measurements) == 7
    for figures in measurements.values():
        assert 0 <= figures["acc"] <= 1 and figures["answer_nll"] > 0
        assert 0 < figures["acc_stderr"] < 0.2 and figures["answer_nll_stderr"] > 0
        assert figures["questions"] == 20 and figures["version"] == 1
    assert metrics["versions"]["lm_eval"] == version("lm_eval")
    assert "prepare_data" in metrics["splits"] and "not comparable" in metrics["splits"]


def test_every_stage_writes_what_it_cost(sweep: Sweep) -> None:
    costs = {file.stem: json.loads(file.read_text()) for file in (sweep.at_first / "costs").glob("*.json")}
    assert costs.keys() >= {stage.replace("@", "-") for stage in STAGES}
    assert all(cost["seconds"] >= 0 and cost["peak_memory_mib"] > 50 for cost in costs.values())


def test_sizes_are_those_of_the_files(sweep: Sweep, metrics: dict[str, Any]) -> None:
    shipped, model = (
        sum(file.stat().st_size for file in (sweep.at_first / "artifacts" / name).glob("*.safetensors"))
        for name in ("emulator", "model")
    )
    size = metrics["emulator"]
    assert (size["bytes"], size["model_bytes"]) == (shipped, model)
    assert size["share_of_model"] == pytest.approx(shipped / model) and 0 < shipped < model
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


def test_pictures_and_tables_of_the_curves(sweep: Sweep) -> None:
    plots = sweep.at_first / "plots"
    assert sorted(file.stem for file in plots.glob("*.png")) == ["curves", "layers", "measurements"]
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in plots.glob("*.png"))
    tuned = {"offsite_tune@piqa-layers": 10, "offsite_tune@piqa-lora": 10, "full_finetune@piqa": 5}
    for stage, count in {"layer_importance": 20, "train_harmonizers": 10, **tuned}.items():
        rows = read_csv(plots / "loss" / f"{stage}.csv")
        assert [row["step"] for row in rows] == list(range(count)) and all(row["loss"] > 0 for row in rows)
    scores = json.loads((sweep.at_first / "artifacts" / "harmonizers" / "scores.json").read_text())
    layers = read_csv(plots / "layers.csv")
    assert [[row[column] for row in layers] for column in ("score", "prior")] == [scores["scores"], scores["prior"]]


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


def test_experiments_are_listed_with_their_alpha_and_metrics(sweep: Sweep) -> None:
    (committed,) = (entry for entry in sweep.shown if entry["rev"] != "workspace")
    (experiment,) = (found for group in committed["experiments"] for found in group["revs"])
    seen = []
    for entry in (committed, experiment):
        data = entry["data"]
        layers = data["metrics"]["metrics.json"]["data"]["emulator"]["harmonizer_layers"]
        seen.append((data["params"]["params.yaml"]["data"]["alpha"], layers))
    assert seen == [(0.25, 1), (0.5, 2)]
    changed = sweep.diff["metrics.json"]
    assert changed["emulator.harmonizer_layers"] == {"old": 1, "new": 2, "diff": 1}
    assert not [key for key in changed if "full_finetune" in key or "zero_shot" in key.replace("emulator_zero", "")]


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


def test_lock_of_another_kind_of_machine_finds_the_runs_that_were_made_here(sweep: Sweep) -> None:
    """As after `git checkout dvc.lock`, with the outputs of a machine whose bytes are others, none of them here."""
    lock = sweep.repository.folder / "dvc.lock"
    before = lock.read_text()
    stages = yaml.safe_load(before)["stages"]
    same_anywhere = {"artifacts/sources.json", "artifacts/tasks", "artifacts/corpus"}
    others: dict[str, str] = {
        out["md5"]: hashlib.md5(out["md5"].encode()).hexdigest() + ".dir" * out["md5"].endswith(".dir")
        for stage in stages.values()
        for out in stage["outs"]
        if out["path"] not in same_anywhere
    }
    lock.write_text(re.sub(r"(?<=md5: )\S+", lambda match: others.get(match[0], match[0]), before))
    told = sweep.repository.call("dvc", "repro")
    assert re.findall(r"Running stage '(.+)'", told) == [SOURCES]
    assert lock.read_text() == before


def test_adapter_layers_and_nothing_else_come_back_changed(sweep: Sweep) -> None:
    artifacts = sweep.at_first / "artifacts"
    manifest = Package(artifacts / "emulator").manifest  # raises where any file isn't as compress wrote it
    shipped = tensors(artifacts / "emulator")
    returned = load_file(artifacts / "adapters" / "piqa" / "layers" / "adapter" / "adapter.safetensors")
    whole = tensors(artifacts / "model")
    adapters = [f"model.layers.{i}." for i, layer in enumerate(manifest.layers) if layer.kind == "adapter"]
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
    for name, value in sweep.repository.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(sweep.repository.folder)


@pytest.mark.usefixtures("inside")
def test_experiments_are_made_once_and_leave_the_project_as_it_is(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a stage, as the demo has it."""
    changes = {"half-of-beta": {"beta": 0.4}}
    folder, stages = sweep.repository.folder, ["compress"]
    before = {name: (folder / name).read_bytes() for name in ("params.yaml", "dvc.lock", "metrics.json")}
    runs = experiments.run_all(changes, "test", stages)
    assert before == {name: (folder / name).read_bytes() for name in before}
    runs["half-of-beta"].write("artifacts/emulator", tmp_path)
    size = folder_bytes(tmp_path / "artifacts/emulator", ".safetensors")
    assert size > read_metrics(sweep.at_first)["emulator"]["bytes"]
    monkeypatch.setattr(experiments, "_Pool", lambda jobs: pytest.fail("it ran again"))
    assert experiments.run_all(changes, "test", stages) == runs


def test_two_clones_share_finished_stages_and_experiments(sweep: Sweep, tmp_path: Path) -> None:
    """Through a remote for DVC and one for git, as the README says; the second clone runs nothing that was run."""
    environment = sweep.repository.environment | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    one = Repository(Path(shutil.copytree(sweep.repository.folder, tmp_path / "one")), environment)
    two = Repository(tmp_path / "two", environment)
    remote = str(tmp_path / "remote.git")
    one.call("git", "init", "--bare", "--quiet", remote)
    one.call("git", "checkout", "--quiet", "--force", "HEAD")
    one.call("git", "remote", "add", "origin", remote)
    one.call("dvc", "remote", "add", "--default", "shared", str(tmp_path / "store"))
    one.call("git", "commit", "--quiet", "--all", "--message", "a remote")
    one.call("git", "push", "--quiet", "origin", "HEAD:main")
    one.call("dvc", "checkout")
    one.call("dvc", "exp", "run", "--temp", "--name", "shared-alpha", "--set-param", "alpha=0.5")
    one.call("dvc", "push", "--run-cache")
    one.call("dvc", "exp", "push", "origin", "shared-alpha")

    two.call("git", "clone", "--quiet", "--branch", "main", remote, "two", folder=tmp_path)
    two.call("git", "config", "user.name", "other")
    two.call("git", "config", "user.email", "other@example.com")
    two.call("dvc", "pull", "--run-cache")
    assert stages_that("ran", two.call("dvc", "repro")) == [SOURCES]
    two.call("dvc", "exp", "pull", "origin", "shared-alpha")
    assert "shared-alpha" in two.call("dvc", "exp", "list")
    again = two.call("dvc", "exp", "run", "--set-param", "alpha=0.5")
    assert stages_that("ran", again) == ["evaluate", SOURCES]  # metrics.json is in git, not in the cache
    assert set(stages_that("cached", again)) == {*DOWNSTREAM} - {"evaluate"}
    assert read_metrics(two.folder)["emulator"] == read_metrics(sweep.at_changed)["emulator"]


def test_stages_read_what_dvc_links_to_its_cache_and_pack_ships_the_files_themselves(
    sweep: Sweep, tmp_path: Path
) -> None:
    """`cache.type`, which DVC recommends for large files and shared caches."""
    folder = Path(shutil.copytree(sweep.repository.folder, tmp_path / "project", symlinks=True))
    call = Repository(folder, sweep.repository.environment).call

    def links(folder: Path) -> set[str]:
        return {file.name for file in folder.iterdir() if file.is_symlink()}

    call("dvc", "config", "cache.type", "symlink")
    call("dvc", "checkout", "--relink")
    assert links(folder / "artifacts/emulator") >= {"manifest.json", "base.safetensors", "tokenizer_config.json"}
    call("dvc", "repro", "--force", "--single-item", "offsite_tune@piqa-layers")
    call("python", "-m", "scaleot_core.cli", "pack", "--out", str(tmp_path / "shipped"))
    assert not links(tmp_path / "shipped") and Package(tmp_path / "shipped").plan
    assert (tmp_path / "shipped.private.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("inside")
def test_attacks_over_the_dial(sweep: Sweep) -> None:
    """Run the pipeline and the attack in one experiment a setting; the last here, since it changes the repository."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "studies", "studies", ignore=ignored, dirs_exist_ok=True)
    settings = yaml.safe_load(Path("studies/attacks.yaml").read_text())
    small = {"tasks": ["piqa"], "adapter_layers": 1, "attack.steps": 4, "attack.eval_points": 1}
    settings |= {"alphas": [0.5], "betas": [0.8], "channels": [], "variants": {}, "seeds": [0, 1]}
    settings["changes"] |= small | {"attack.membership_records": 10, "adapters": ["lora"]}
    Path("studies/attacks.yaml").write_text(yaml.safe_dump(settings))
    sweep.repository.call("git", "add", "studies")
    sweep.repository.call("git", "commit", "--quiet", "--message", "studies")
    sweep.repository.call("python", "-m", "studies.attacks")
    rows = read_csv(Path("docs/studies/attacks.csv"))
    assert [row["adapters"] for row in rows] == ["lora"]
    for row in rows:
        assert (row["alpha"], row["beta"], row["channels"]) == (0.5, 0.8, 0.0)
        columns = ("remaining gap", "remaining gap ±", "gap acc", "membership AUC")
        assert all(isinstance(row[name], float) for name in columns)
        assert 0 < row["bytes exact"] < 1 and row["bytes exact ±"] == 0
    assert Path("docs/studies/attacks.png").stat().st_size > 10_000
