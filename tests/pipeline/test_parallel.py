"""Two processes on the CPU, as torchrun starts them, and `accelerate launch` by it, do what one does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, change, run, succeed, write_project
from transformers import PreTrainedTokenizerFast

from scaleot_core.common import distributed
from scaleot_core.common.tensors import read_tensors
from scaleot_core.training import gradients

LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]  # what accelerate calls


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "project"
    folder.mkdir()
    write_project(folder, tokenizer)
    change(
        folder, dlr={"steps": 10, "score_interval": 5, "batch_blocks": 3}, offsite_tune={"epochs": 2, "batch_size": 7}
    )
    succeed(
        folder, "prepare_data", "layer_importance", "train_harmonizers", "compress", "offsite_tune", "full_finetune"
    )
    return folder


def launch(python: str | Path, folder: Path, *command: str, **changes: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), **changes}
    done = subprocess.run(
        [python, *LAUNCH, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def launched(warm_bin: Path) -> Callable[..., str]:
    """Run a script in two processes and give what they said."""
    return partial(launch, sys.executable)


def close(one: Path, two: Path) -> None:
    first, second = read_tensors(one), read_tensors(two)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch --use_fsdp` says it

OUTPUTS = {
    "train_harmonizers": ("artifacts/harmonizers", "harmonizers.safetensors"),
    "offsite_tune": ("artifacts/adapters/piqa/layers", "adapter/adapter.safetensors"),
    "full_finetune": ("artifacts/baselines/full_finetune-piqa", None),
}


@pytest.mark.parametrize("fsdp", [False, True], ids=["each holds all", "layers are split"])
@pytest.mark.parametrize("stage", OUTPUTS)
def test_two_processes_give_one_processs_losses_and_weights(
    launched: Callable[..., str], alone: Path, tmp_path: Path, stage: str, fsdp: bool
) -> None:
    two = Path(shutil.copytree(alone, tmp_path / "project"))
    output, tensors = OUTPUTS[stage]
    shutil.rmtree(two / output)
    task = {"offsite_tune": ["piqa", "layers"], "full_finetune": ["piqa"]}.get(stage, [])
    said = launched(two, f"stages/{stage}.py", *task, **(FSDP if fsdp else {}))
    assert said.count("2 processes, each with") == 1  # the first one speaks
    losses = [[row["loss"] for row in json.loads((f / output / "history.json").read_text())] for f in (alone, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) > 3
    if tensors:
        close(alone / output / tensors, two / output / tensors)
    if stage == "train_harmonizers":
        scores = [json.loads((f / output / "scores.json").read_text())["scores"] for f in (alone, two)]
        assert scores[1] == pytest.approx(scores[0], rel=1e-4, abs=1e-7)
    names = [sorted(str(f.relative_to(x)) for f in (x / output).rglob("*")) for x in (alone, two)]
    assert names[0] == names[1]
    scratch = two / ".scaleot" / "scratch"
    assert not [f for f in scratch.iterdir() if stage in f.name]


@pytest.mark.parametrize(("blocks", "fsdp"), [(3, False), (3, True), (1, True)])
def test_two_processes_distil_as_one_does(
    launched: Callable[..., str], alone: Path, tmp_path: Path, blocks: int, fsdp: bool
) -> None:
    """Of the states of a batch there is one mean square; of a batch of one block a process has nothing."""
    one, two = (Path(shutil.copytree(alone, tmp_path / name)) for name in ("one", "two"))
    for folder in (one, two):
        change(folder, method="distilled", distill={"steps": 6, "batch_blocks": blocks, "lr": 0.01})
        shutil.rmtree(folder / "artifacts/emulator")
    succeed(one, "compress")
    launched(two, "stages/compress.py", **(FSDP if fsdp else {}))
    for file in ("compressed.safetensors", "adapter.safetensors", "base.safetensors"):
        close(one / "artifacts/emulator" / file, two / "artifacts/emulator" / file)
    names = [sorted(str(f.relative_to(x)) for f in (x / "artifacts").rglob("*")) for x in (one, two)]
    assert names[0] == names[1]


def test_two_processes_compress_to_one_processs_bytes(
    launched: Callable[..., str], alone: Path, tmp_path: Path
) -> None:
    two = Path(shutil.copytree(alone, tmp_path / "project"))
    shutil.rmtree(two / "artifacts/emulator")
    launched(two, "stages/compress.py")
    for file in (alone / "artifacts/emulator").iterdir():
        assert (two / "artifacts/emulator" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("fsdp", [False, True], ids=["each holds all", "layers are split"])
def test_two_processes_attack_as_one_does(
    launched: Callable[..., str], alone: Path, tmp_path: Path, fsdp: bool
) -> None:
    one, two = (Path(shutil.copytree(alone, tmp_path / name)) for name in ("one", "two"))
    for folder in (one, two):
        (folder / "studies").mkdir()
        shutil.copy(ROOT / "studies/dvc.yaml", folder / "studies")
        small = {"steps": 4, "eval_points": 2, "batch_blocks": 3, "lr": 0.01, "eval_questions": 8}
        change(folder, attack={**small, "membership_records": 8, "references": []})
    succeed(one, "attack")
    launched(two, "stages/attack.py", **(FSDP if fsdp else {}))
    found = [json.loads((folder / "attack.json").read_text()) for folder in (one, two)]
    ends = [{name: row["perplexity"] for name, row in each["restoration"].items()} for each in found]
    assert ends[1] == pytest.approx(ends[0], rel=1e-3) and len(ends[0]) == 3
    assert found[1]["weights"] == found[0]["weights"] and found[1]["before"] == found[0]["before"]
    names = [sorted(str(f.relative_to(x)) for f in (x / "artifacts").rglob("*")) for x in (one, two)]
    assert names[0] == names[1]


HALVES = """
import json
from pathlib import Path
import torch
from scaleot_core.common import distributed
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.loading import load_model
from scaleot_core.models.streaming import load_sharded
distributed.init_process_group(cpu=True)
where = dict(device=torch.device("cpu"), dtype=torch.float32)
mine, whole = load_sharded(Path("artifacts/model"), **where), load_model(Path("artifacts/model"), **where)
blocks = torch.arange(64).view(2, 32)
same = abs(mean_loss(mine, blocks) - mean_loss(whole, blocks)) < 1e-5
parts = {name: p.to_local() if distributed.is_sharded(p) else p for name, p in mine.named_parameters()}
shares = {name: parts[name].numel() / p.numel() for name, p in whole.named_parameters()}
with torch.no_grad():  # a pass sees the weights as they are now
    for model in (mine, whole):
        for name, p in model.named_parameters():
            if name.startswith("model.layers."):
                p.mul_(1.5)
same = same and abs(mean_loss(mine, blocks) - mean_loss(whole, blocks)) < 1e-5
with open(f"seen-{distributed.is_main_process()}.json", "w") as out:
    json.dump({"shares": shares, "same": same}, out)
"""


def test_each_of_two_processes_holds_half_of_every_layer(
    launched: Callable[..., str], alone: Path, tmp_path: Path
) -> None:
    two = Path(shutil.copytree(alone, tmp_path / "project"))
    (two / "halves.py").write_text(HALVES)
    launched(two, "halves.py", **FSDP)
    for first in (True, False):
        seen = json.loads((two / f"seen-{first}.json").read_text())
        assert seen["same"]
        for name, share in seen["shares"].items():
            assert share == (0.5 if name.startswith("model.layers.") else 1), name


def test_rates_and_patience_with_split_layers_are_those_of_one_process(
    launched: Callable[..., str], alone: Path, tmp_path: Path
) -> None:
    one, two = (Path(shutil.copytree(alone, tmp_path / name)) for name in ("one", "two"))
    output = Path(OUTPUTS["full_finetune"][0])
    for folder in (one, two):
        change(folder, full_finetune={"lr": [1e-2, 1e-4], "epochs": 3, "patience": 1, "validation_fraction": 0.3})
        shutil.rmtree(folder / output)
    succeed(one, "full_finetune")
    launched(two, "stages/full_finetune.py", "piqa", **FSDP)
    for file in ("tuning.json", "results.json"):
        first, second = (json.loads((folder / output / file).read_text()) for folder in (one, two))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_lora_inside_split_layers_is_that_of_one_process(alone: Path, tmp_path: Path) -> None:
    """Its processes start cold, as a user's do."""
    one, two = (Path(shutil.copytree(alone, tmp_path / name)) for name in ("one", "two"))
    for folder in (one, two):
        change(folder, adapters=["lora"], lora={"rank": 2}, offsite_tune={"max_steps": 4})
    assert run(one, "offsite_tune", ["piqa", "lora"]).code == 0
    launch(sys.executable, two, "stages/offsite_tune.py", "piqa", "lora", **FSDP)
    tuned = Path("artifacts/adapters/piqa/lora/adapter/adapter_model.safetensors")
    close(one / tuned, two / tuned)


@pytest.mark.parametrize("fsdp", [False, True], ids=["each holds all", "layers are split"])
def test_interrupted_together_and_resumed_together(
    launched: Callable[..., str], alone: Path, tmp_path: Path, fsdp: bool
) -> None:
    two = Path(shutil.copytree(alone, tmp_path / "project"))
    output = OUTPUTS["offsite_tune"][0]
    shutil.rmtree(two / output)
    change(two, checkpoint_seconds=0, offsite_tune={"max_steps": 5, "epochs": 2})
    script = two / "stop.py"
    script.write_text(
        "import os, runpy, signal, sys\n"
        "from scaleot_core.tuning import tuner\n"
        "measure, seen = tuner.answer_loss, []\n"
        "def step(*args):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return measure(*args)\n"
        "tuner.answer_loss = step\n"
        "sys.argv = ['stages/offsite_tune.py', 'piqa', 'layers']\n"
        "try: runpy.run_path('stages/offsite_tune.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 130, end\n"
    )
    sharding = FSDP if fsdp else {}
    launched(two, "stop.py", **sharding)
    assert not (two / output).exists()
    said = launched(two, "stages/offsite_tune.py", "piqa", "layers", **sharding)
    assert "resuming after step 3" in said
    assert len(json.loads((two / output / "history.json").read_text())) == 5


def test_alone_everything_is_ones_own() -> None:
    batch = torch.arange(5)
    assert (
        distributed.world_size() == 1
        and distributed.is_main_process()
        and torch.equal(distributed.shard_batch(batch), batch)
    )
    assert (
        distributed.all_reduce_sum(2.5) == 2.5 and distributed.any_process(True) and not distributed.any_process(False)
    )
    weight = torch.nn.Parameter(torch.tensor(2.0))
    assert gradients.backward(batch.float(), lambda part: weight * part.mean()) == 4.0
    gradients.sum_gradients([weight])
    assert weight.grad == 2.0


@pytest.mark.parametrize(("rank", "mine"), [("0", [0, 2, 4]), ("1", [1, 3])])
def test_shares_are_disjoint_and_whole(monkeypatch: pytest.MonkeyPatch, rank: str, mine: list[int]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert (
        distributed.shard_batch([0, 1, 2, 3, 4]) == mine and distributed.shard_batch(torch.arange(5)).tolist() == mine
    )
