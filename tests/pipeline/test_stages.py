"""Every stage by itself: what it reads, that its bytes repeat, that it survives a kill, what a mistake ends in."""

import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import (
    CONFIGS,
    GSM8K,
    PAGES,
    PER_TASK,
    ROOT,
    change,
    command,
    run,
    succeed,
    tiny_model,
    write_project,
)
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from scaleot_core import results
from scaleot_core.artifacts import Artifacts
from scaleot_core.common.files import read_csv, read_json, write_json
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression.plan import LayerKind
from scaleot_core.exchange.ledger import read_exact
from scaleot_core.exchange.package import Package
from scaleot_core.params import load_params
from scaleot_core.reporting import figures
from scaleot_core.reporting.measurements import five
from studies import budgets

OUTPUTS = {
    "layer_importance": "artifacts/importance",
    "train_harmonizers": "artifacts/harmonizers",
    "compress": "artifacts/emulator",
    "offsite_tune": "artifacts/adapters/piqa/layers",
}
STEPS = {"layer_importance": 100, "train_harmonizers": 150, "offsite_tune": 150}
PARAMS = {
    "layer_importance.steps": STEPS["layer_importance"],
    "dlr.steps": STEPS["train_harmonizers"],
    "offsite_tune.epochs": STEPS["offsite_tune"] // 5,  # of 40 questions in batches of 8
}


def files(folder: Path) -> dict[str, bytes]:
    """All files in a folder, hidden ones too, by path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A project before its first stage. Not to be changed."""
    folder = tmp_path_factory.mktemp("given") / "project"
    folder.mkdir()
    write_project(folder, tokenizer, **PARAMS)
    return folder


@pytest.fixture(scope="module")
def made(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after prepare_data to offsite_tune, none of them stopped. Not to be changed."""
    folder = Path(shutil.copytree(given, tmp_path_factory.mktemp("made") / "project"))
    succeed(folder, "sources", "prepare_data", *OUTPUTS)
    return folder


@pytest.fixture
def fresh(given: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(given, tmp_path / "project"))


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


@pytest.fixture
def owners(made: Path, tmp_path: Path) -> Path:
    """What the data owner has: the stages, dvc.yaml, params.yaml, the package and the private questions."""
    folder = tmp_path / "owner"
    for name in ("stages", "artifacts/emulator"):
        shutil.copytree(made / name, folder / name)
    for name in ("dvc.yaml", "params.yaml", "artifacts/tasks/piqa/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / name, folder / name)
    return folder


def test_the_data_owner_needs_no_model_and_no_network(
    made: Path, owners: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: called.append(args))
    succeed(owners, "offsite_tune")
    assert files(owners / OUTPUTS["offsite_tune"]) == files(made / OUTPUTS["offsite_tune"])
    assert not called


def test_same_params_give_the_same_bytes(made: Path, fresh: Path) -> None:
    succeed(fresh, "prepare_data", *OUTPUTS)
    for name in ("tasks", "corpus", "model", *(Path(output).relative_to("artifacts") for output in OUTPUTS.values())):
        first, second = files(made / "artifacts" / name), files(fresh / "artifacts" / name)
        assert first and first == second, name


def start(folder: Path, stage: str) -> subprocess.Popen[str]:
    """Start a stage in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, *command(stage)]
    return subprocess.Popen(command_line, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def saved_steps(folder: Path) -> int:
    """Return the finished steps of the newest whole checkpoint in scratch, 0 without one."""
    steps = [0]
    for at, _, names in os.walk(folder / ".scaleot" / "scratch"):  # what vanishes under it, it passes over
        if "progress.json" in names and not Path(at).name.startswith("."):
            try:
                steps.append(json.loads((Path(at) / "progress.json").read_text())["step"])
            except FileNotFoundError:  # the next one just took its place
                continue
    return max(steps)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STEPS)
def test_stopped_stage_goes_on_to_the_same_bytes(
    made: Path, project: Path, owners: Path, stage: str, number: signal.Signals
) -> None:
    folder = owners if stage == "offsite_tune" else project
    output = folder / OUTPUTS[stage]
    shutil.rmtree(output, ignore_errors=True)
    change(folder, checkpoint_seconds=0)
    process = start(folder, stage)
    while (saved := saved_steps(folder)) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    lines = process.communicate()[1].splitlines()
    change(folder, checkpoint_seconds=1000)
    assert saved >= 3, lines
    if number == signal.SIGINT:
        assert process.returncode == 130 and lines[-1].startswith("interrupted; "), lines
    else:
        assert process.returncode == -signal.SIGKILL
    assert not list(output.parent.glob(f"*{output.name}*"))  # neither the output nor a part under another name
    (line,) = (line for line in succeed(folder, stage) if line.startswith("resuming after step "))
    assert saved <= int(line.split()[-1]) < STEPS[stage]
    assert files(output) == files(made / OUTPUTS[stage])
    assert not [file.name for file in (folder / ".scaleot" / "scratch").iterdir() if stage in file.name]


@pytest.mark.parametrize("stage", OUTPUTS)
def test_stage_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(made: Path, project: Path, stage: str) -> None:
    """The moment is drawn from the seconds that the stage takes, its last writes among them."""
    output, expected = project / OUTPUTS[stage], files(made / OUTPUTS[stage])
    shutil.rmtree(output)
    change(project, checkpoint_seconds=0.05)
    (cost,) = (made / "costs").glob(f"{stage}*.json")
    seconds = json.loads(cost.read_text())["seconds"]
    process = start(project, stage)
    assert process.stderr is not None
    process.stderr.readline()  # its first word comes after the imports
    time.sleep(random.Random(stage).uniform(0, 1.2 * seconds + 0.2))
    process.kill()
    printed = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), printed
    assert files(output) in ({}, expected)  # whole or not at all
    succeed(project, stage)
    assert files(output) == expected


def test_another_seed_gives_others(made: Path, project: Path) -> None:
    change(project, seed=1)
    for stage in STEPS:
        succeed(project, stage)
        first, second = files(made / OUTPUTS[stage]), files(project / OUTPUTS[stage])
        same = {name for name in first if first[name] == second[name]} - {"tuning.json"}  # a single rate is what it is
        assert first.keys() == second.keys() and not same, stage


def refused(folder: Path, stage: str, *parts: str, arguments: list[str] | None = None) -> None:
    """A stage ends with code 1 and one line that has all `parts`, before a step of training, and writes no output."""
    before = files(folder)
    ended = run(folder, stage, arguments)
    assert ended.code == 1, ended.said
    assert [line for line in ended.said if line.startswith("error: ")] == ended.said[-1:], ended.said
    assert all(part in ended.said[-1] for part in parts), ended.said[-1]
    assert not [line for line in ended.said if "loss" in line], ended.said
    new = [name for name, content in files(folder).items() if content != before.get(name)]
    earlier = ("artifacts/model", "artifacts/tasks") if stage == "prepare_data" else ()  # whole parts of its output
    assert not [name for name in new if not name.startswith(earlier)]


MISTAKES = {
    "out of range": ({"alpha": 1.5}, ["params.yaml: alpha = 1.5", "0 to 1"]),
    "mistyped key": ({"adaptor_layers": 1}, ["params.yaml: adaptor_layers is no parameter"]),
    "too many layers": ({"adapter_layers": 99}, ["params.yaml: adapter_layers = 99", "4 decoder layers", "1 to 3"]),
    "unknown task": ({"tasks": ["piqaa"]}, ["params.yaml: tasks: 'piqaa'", "did you mean piqa"]),
    "no model": ({"model": "./nowhere"}, ["params.yaml: model = './nowhere'", "no such file or folder"]),
    "no corpus": ({"data": {"corpus": "./none.jsonl"}}, ["data.corpus = './none.jsonl'", "no such file or folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_params_is_told_before_anything_is_written(fresh: Path, mistake: str) -> None:
    changes, parts = MISTAKES[mistake]
    change(fresh, **changes)
    refused(fresh, "prepare_data", *parts)
    assert not (fresh / "artifacts").exists()


def test_mistake_ends_a_process_with_code_1_and_one_line(fresh: Path) -> None:
    change(fresh, alpha=1.5)
    process = start(fresh, "prepare_data")
    printed = process.communicate()[1]
    assert process.returncode == 1 and printed.count("\n") == 1, printed
    assert printed.startswith("error: params.yaml: alpha = 1.5")


def cut(file: Path) -> None:
    """Lose the end of a file, as a broken copy does."""
    file.write_bytes(file.read_bytes()[:-8])


def without_label(file: Path) -> None:
    rows = file.read_text().splitlines()
    rows[2] = json.dumps({key: value for key, value in json.loads(rows[2]).items() if key != "label"})
    file.write_text("\n".join(rows))


INPUTS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "no weights": ("tiny-model/model.safetensors", Path.unlink, ["params.yaml: model = 'tiny-model'", "no weights"]),
    "damaged weights": ("tiny-model/model.safetensors", cut, ["params.yaml: model = 'tiny-model'", "can't be loaded"]),
    "empty corpus": ("tiny-data/corpus.jsonl", lambda file: file.write_text(""), ["data.corpus", "no text"]),
    "no answer": (
        "tiny-data/piqa/train.jsonl",
        without_label,
        ["train.jsonl, line 3: its answer is none of its choices"],
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_input_that_cannot_be_used_is_told_by_its_name(fresh: Path, name: str) -> None:
    file, spoil, parts = INPUTS[name]
    spoil(fresh / file)
    refused(fresh, "prepare_data", *parts)
    assert "corpus" in file or not files(fresh / "artifacts/tasks")


def test_private_question_without_its_answer(owners: Path) -> None:
    without_label(owners / "artifacts/tasks/piqa/train.jsonl")
    refused(owners, "offsite_tune", "task piqa, training row 3: its answer is none of its choices")


DAMAGED = {
    "artifacts/importance/harmonizers.safetensors": "train_harmonizers",
    "artifacts/harmonizers/harmonizers.safetensors": "compress",
    "artifacts/emulator/base.safetensors": "offsite_tune",
    "artifacts/emulator/adapter.safetensors": "offsite_tune",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_damaged_tensors(project: Path, file: str) -> None:
    stage = DAMAGED[file]
    cut(project / file)
    shutil.rmtree(project / OUTPUTS[stage])
    refused(project, stage, file)


@pytest.mark.parametrize(("stage", "folder"), [("train_harmonizers", "importance"), ("compress", "harmonizers")])
def test_scores_with_nan(project: Path, stage: str, folder: str) -> None:
    file = project / "artifacts" / folder / "scores.json"
    scores = json.loads(file.read_text())
    scores["scores"][1] = float("nan")
    file.write_text(json.dumps(scores))
    refused(project, stage, "scores", "layer 1", "nan")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("stage", ["layer_importance", "train_harmonizers", "zero_shot", "full_finetune"])
def test_model_with_infinite_weights(project: Path, stage: str, name: str) -> None:
    file = project / "artifacts" / "model" / "model.safetensors"
    tensors = read_tensors(file)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    shutil.rmtree(project / OUTPUTS.get(stage, "artifacts/baselines"), ignore_errors=True)
    before = files(project / "artifacts")
    ended = run(project, stage)
    assert ended.code == 1 and ended.said[-1].startswith("error: "), ended.said
    assert files(project / "artifacts") == before


def test_alpha_that_leaves_no_layer_to_compress_is_told(project: Path) -> None:
    change(project, alpha=1.0)
    assert "alpha = 1.0 leaves no layer to compress, so beta = 0.8 does nothing" in succeed(project, "compress")
    assert not (project / "artifacts/emulator/compressed.safetensors").exists()


def test_package_from_within_what_has_left_adds_nothing(project: Path) -> None:
    """The second one is calibrated on other text, so that of all channels it would take others."""
    private, old = project / "artifacts" / "emulator.private.json", project / "old.private.json"
    change(project, method="channels", channels={"ratio": 0.25}, rank_compression={"calibration_blocks": 24})
    succeed(project, "compress")
    first = private.rename(old)
    change(project, channels={"ratio": 0.3}, rank_compression={"calibration_blocks": 1})
    sets = {}
    for within in ("", str(old)):
        change(project, channels={"within": within})
        succeed(project, "compress")
        exact = [record for file in (first, private) for record in read_exact(file).values()]
        sets[within] = (exact[0] | exact[1]).share - exact[0].share
    assert sets[""] > 0 and sets[str(old)] == 0
    data = read_json(old)
    write_json(old, data | {"exact": data["exact"] | {"model": "another"}})
    ended = run(project, "compress")
    assert ended.code == 1 and "channels.within" in ended.said[-1] and "no package of this model" in ended.said[-1]


def one_model_at_a_time(patch: pytest.MonkeyPatch) -> None:
    """Let stage evaluate load the real model only when the emulator, or the plug-in before, is gone from memory."""
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load_package, load_model = Package.load, results.load_model

    def emulator(*args: Any, **options: Any) -> Any:
        model = load_package(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    def whole(*args: Any, **options: Any) -> Any:
        assert {reference() for reference in loaded} <= {None}
        model = load_model(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    patch.setattr(Package, "load", emulator)
    patch.setattr(results, "load_model", whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "uniform"},
        {"method": "distilled", "distill": {"steps": 5}},
        {"method": "crash"},
        {"method": "gradot"},
        {"method": "scaleot", "max_bytes_ratio": 0.9},
        {"adapters": ["layers", "lora"], "lora": {"rank": 4}},
        {"adapters": ["lora"], "lora": {"rank": 4, "layers": "adapter", "modules": "attention"}},
        {"method": "channels", "adapters": ["lora"], "channels": {"ratio": 0.5}, "adapter_layers": 0},
        {"method": "crash", "adapters": ["lora"], "adapter_layers": 0},
        {"offsite_tune": {"epsilon": 8.0, "delta": 0.01, "epochs": 1}},
        {"adapters": ["lora"], "offsite_tune": {"epsilon": 8.0, "delta": 0.01, "epochs": 1}},
    ],
    ids=str,
)
def test_every_way_goes_through_the_rest_of_the_pipeline(
    made: Path, project: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(project, **{"offsite_tune": {"epochs": 1}, **changes})
    kinds = changes.get("adapters", ["layers"])
    succeed(project, "zero_shot", "full_finetune", "compress")
    for kind in kinds:
        ended = run(project, "offsite_tune", ["piqa", kind])
        assert ended.code == 0, ended.said
    with monkeypatch.context() as patch:
        one_model_at_a_time(patch)
        succeed(project, "evaluate")
    metrics = json.loads((project / "metrics.json").read_text())
    emulator = metrics["emulator"]
    for kind in kinds:
        measured = five(metrics["tasks"]["piqa"], kind)
        assert all(math.isfinite(measured[name]["answer_nll"]) for name in ("emulator_zero_shot", "plug_in"))
        assert measured["plug_in"] != measured["zero_shot"]
        assert json.loads((project / f"costs/offsite_tune-piqa-{kind}.json").read_text())["tokens"] > 1000
    assert sum(emulator[f"{kind}_layers"] for kind in get_args(LayerKind)) == 4
    assert emulator["adapter_layers"] == changes.get("adapter_layers", 1)
    size = sum(file.stat().st_size for file in (made / OUTPUTS["compress"]).glob("*.safetensors"))
    if changes.get("method", "scaleot") != "scaleot":
        assert emulator["bytes"] <= size + 10_000  # of headers


def test_attack_tells_recovery_weights_and_membership(project: Path) -> None:
    (project / "studies").mkdir()
    shutil.copy(ROOT / "studies/dvc.yaml", project / "studies")
    change(project, attack={"steps": 8, "eval_points": 2, "eval_questions": 12, "membership_records": 20})
    succeed(project, "sources")
    before = files(project / "artifacts")
    assert any("the model" in line for line in succeed(project, "attack"))
    attack = json.loads((project / "attack.json").read_text())
    attackers = {"package", "cut_only", "queries"}
    assert attack["restoration"].keys() == {*attackers, "model", "widened", "without_weights", "uniform"}
    for row in attack["restoration"].values():
        assert row["tokens"] == 8 * 4 * 32 and math.isfinite(row["recovered"])
        assert 0 <= row["tasks"]["piqa"]["acc"] <= 1 and row["tasks"]["piqa"]["questions"] == 12
        assert row["open"]["piqa"]["text_perplexity"] > 1 and 0 <= row["open"]["piqa"]["answer_tokens"] <= 1
    assert len({attack["restoration"][name]["perplexity"] for name in attackers}) == 3  # each by its own way
    assert attack["restoration"]["model"]["perplexity"] < attack["before"]["model"]["perplexity"]  # by such text
    model, floor = attack["before"]["model"]["above_floor"], attack["restoration"]["without_weights"]["above_floor"]
    assert model["corpus"] == model["piqa"]["text"] == 1 and floor["corpus"] == floor["piqa"]["text"] == 0
    assert sum(attack["weights"].values()) == pytest.approx(1) and all(attack["weights"].values())
    for kind in load_params(project / "params.yaml").adapters:
        member = attack["membership"]["piqa"][kind]
        assert all(0 <= member[name]["auc"] <= 1 for name in ("loss", "calibrated"))
    after = files(project / "artifacts")
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {f"attack/{name}" for name in ("restoration.csv", "weights.csv")}
    change(project, attack={"attackers": [], "references": ["uniform"]})
    assert not any("the model" in line for line in succeed(project, "attack"))  # it is as it was
    fewer = json.loads((project / "attack.json").read_text())["restoration"]
    assert fewer.keys() == {"package", "uniform"}
    for name, row in fewer.items():  # the same figures, but for the floor, which is a reference that is left out
        assert row == {key: value for key, value in attack["restoration"][name].items() if key != "above_floor"}


def test_budgets_are_attacks_of_their_own_and_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "studies").mkdir()
    shutil.copy(ROOT / "studies/dvc.yaml", project / "studies")
    blocks = read_tensors(project / "artifacts/corpus/train.safetensors")["blocks"]
    change(project, attack={"batch_blocks": 4, "lr": 0.003})
    most = len(blocks) // 4 + 1
    monkeypatch.chdir(project)
    monkeypatch.setattr(budgets, "mean_loss", lambda *parts: 1.0)  # the tiny model knows nothing that can be missed
    monkeypatch.setattr(sys, "argv", ["budgets", "1", "3", str(most)])
    text, heldout = budgets.attacker_text(load_params(), Artifacts(), most * 4)
    assert len(text) == most * 4 > len(blocks) and torch.equal(text[: len(blocks)], blocks)
    budgets.main()
    rows = read_csv(project / "docs/studies/budgets.csv")
    assert [row["tokens"] for row in rows] == [steps * 4 * blocks.shape[1] for steps in (1, 3, most)]
    assert len({row["loss"] for row in rows}) == 3 and len(heldout)
    monkeypatch.setattr(budgets, "restore", None)  # nothing is attacked again
    budgets.main()
    assert read_csv(project / "docs/studies/budgets.csv") == rows


@pytest.mark.parametrize("arguments", [[], ["other"], ["piqa", "piqa"]], ids=["none", "unknown", "two"])
@pytest.mark.parametrize("stage", PER_TASK)
def test_stage_of_a_task_needs_one_of_params(project: Path, stage: str, arguments: list[str]) -> None:
    refused(project, stage, "name one of the tasks", "piqa", arguments=arguments)


def test_loss_that_blows_up_names_the_step_and_leaves_nothing(owners: Path) -> None:
    change(owners, offsite_tune={"lr": 1.0, "weight_decay": 1e30})
    ended = run(owners, "offsite_tune")
    assert ended.code == 1 and "offsite_tune@piqa-layers: the loss is nan at step 1" in ended.said[-1], ended.said
    assert not files(owners / "artifacts" / "adapters")


@pytest.mark.parametrize("stage", ["prepare_data", *OUTPUTS])
def test_full_disk_leaves_no_part_of_an_output(project: Path, stage: str) -> None:
    """A process whose files may not grow beyond 2 KiB meets the error of a full disk in the middle of a write."""
    output = project / OUTPUTS.get(stage, "artifacts/model")
    shutil.rmtree(output)
    before = files(project)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        ended = run(project, stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 1 and ended.said[-1].startswith("error: "), ended.said
    assert "File too large" in ended.said[-1] and "free space" in ended.said[-1]
    assert files(project) == before
    assert not [path for path in output.parent.glob(f"*{output.name}*") if path.is_dir()]


# --- every model and every kind of task ------------------------------------------------------------------

PIPELINE = ("prepare_data", "layer_importance", "train_harmonizers", "compress", *PER_TASK, "evaluate")


@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - {"llama"}))
def test_every_family_goes_through_the_whole_pipeline(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the pictures, whose drawing no family changes."""
    monkeypatch.setattr(figures, "save_png", lambda figure, path: None)
    write_project(tmp_path, tokenizer, family)
    succeed(tmp_path, *PIPELINE)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["emulator"]["harmonizer_layers"] == 1 and metrics["emulator"]["share_of_model"] < 1
    assert math.isfinite(metrics["tasks"]["piqa"]["adapters"]["layers"]["gap"]["answer_nll"])


def test_other_kinds_of_tasks_go_through_the_whole_pipeline(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A task that generates and one that scores texts, each with learning rates to choose from."""
    write_project(tmp_path, tokenizer, "llama", tasks=["gsm8k", "wikitext"], **{"offsite_tune.lr": [1e-3, 1e-5]})
    tiny_model("llama", max_position_embeddings=512).save_pretrained(tmp_path / "tiny-model")
    for task, rows in (("gsm8k", GSM8K), ("wikitext", PAGES)):
        (tmp_path / "tiny-data" / task).mkdir()
        for part, chosen in (("train", rows[:3]), ("validation", rows[3:])):
            (tmp_path / "tiny-data" / task / f"{part}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    for stage in PIPELINE:
        kind = ["layers"] if stage == "offsite_tune" else []
        for arguments in [["gsm8k", *kind], ["wikitext", *kind]] if stage in PER_TASK else [[]]:
            ended = run(tmp_path, stage, arguments)
            assert ended.code == 0, ended.said
    tasks = json.loads((tmp_path / "metrics.json").read_text())["tasks"]
    assert tasks["wikitext"]["metrics"][0] == "word_perplexity" and tasks["gsm8k"]["metrics"][-1] == "answer_nll"
    adapters = {task: tasks[task]["adapters"]["layers"] for task in tasks}
    assert adapters["wikitext"]["gap"]["token_perplexity"] != 0 and adapters["gsm8k"]["gap"]["answer_nll"] != 0
    for task in ("gsm8k", "wikitext"):
        choice = json.loads((tmp_path / "artifacts" / "adapters" / task / "layers" / "tuning.json").read_text())
        assert adapters[task]["lr"] == choice["lr"] and tasks[task]["lr"] == 5e-5
        assert choice["validation_loss"].keys() == {"0.001", "1e-05"}
