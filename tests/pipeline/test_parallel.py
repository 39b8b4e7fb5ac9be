"""Two processes on the CPU, as torchrun starts them, and `accelerate launch` by it, do what one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, change, run, succeed, write_project
from transformers import PreTrainedTokenizerFast

from scaleot_core.common import distributed
from scaleot_core.common.tensors import read_tensors
from scaleot_core.training import gradients

LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]  # what accelerate calls
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch --use_fsdp` says it
OUTPUTS = {
    "train_harmonizers": ("artifacts/harmonizers", "harmonizers.safetensors"),
    "offsite_tune": ("artifacts/adapters/piqa/layers", "adapter/adapter.safetensors"),
    "full_finetune": ("artifacts/baselines/full_finetune-piqa", None),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return a project after its stages, each in one process. Not to be changed."""
    folder = tmp_path_factory.mktemp("parallel")
    write_project(folder, tokenizer)
    change(folder, dlr={"batch_blocks": 3}, offsite_tune={"epochs": 2, "batch_size": 7})
    succeed(folder, "sources", "prepare_data", "layer_importance", "train_harmonizers", "compress")
    succeed(folder, "offsite_tune", "full_finetune")
    return folder


def copies(alone: Path, tmp_path: Path, without: str, **changes: object) -> tuple[Path, Path]:
    """Return two copies of the project, one for each way, with other parameters and without one output."""
    one, two = (Path(shutil.copytree(alone, tmp_path / name)) for name in ("one", "two"))
    for folder in (one, two):
        change(folder, **changes)
        shutil.rmtree(folder / without, ignore_errors=True)
    return one, two


def launch(folder: Path, *command: str, fsdp: bool = True) -> str:
    """Run a script in two processes; return what they said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (FSDP if fsdp else {})
    command = (sys.executable, *LAUNCH, *command)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_close(one: Path, two: Path) -> None:
    first, second = read_tensors(one), read_tensors(two)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def read(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_text())


@pytest.mark.parametrize(
    ("stage", "fsdp"), [*((stage, True) for stage in OUTPUTS), ("train_harmonizers", False), ("offsite_tune", False)]
)
def test_two_processes_give_one_processs_losses_and_weights(
    alone: Path, tmp_path: Path, stage: str, fsdp: bool
) -> None:
    output, tensors = OUTPUTS[stage]
    _, two = copies(alone, tmp_path, output)
    item = {"offsite_tune": ["piqa", "layers"], "full_finetune": ["piqa"]}.get(stage, [])
    printed = launch(two, f"stages/{stage}.py", *item, fsdp=fsdp)
    assert printed.count("2 processes, each with") == 1  # the first one speaks
    losses = [[row["loss"] for row in read(folder, f"{output}/history.json")] for folder in (alone, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) > 3
    if tensors:
        assert_close(alone / output / tensors, two / output / tensors)
    if stage == "train_harmonizers":
        scores = [read(folder, f"{output}/scores.json")["scores"] for folder in (alone, two)]
        assert scores[1] == pytest.approx(scores[0], rel=1e-4, abs=1e-7)
    assert names(alone / output) == names(two / output)
    assert not [file for file in (two / ".scaleot" / "scratch").iterdir() if stage in file.name]


@pytest.mark.parametrize("blocks", [3, 1])
def test_two_processes_distil_as_one_does(alone: Path, tmp_path: Path, blocks: int) -> None:
    """Of the states of a batch there is one mean square; of a batch of one block a process has nothing."""
    distill = {"steps": 6, "batch_blocks": blocks, "lr": 0.01}
    one, two = copies(alone, tmp_path, "artifacts/emulator", method="distilled", distill=distill)
    succeed(one, "compress")
    launch(two, "stages/compress.py")
    for file in ("compressed.safetensors", "adapter.safetensors", "base.safetensors"):
        assert_close(one / "artifacts/emulator" / file, two / "artifacts/emulator" / file)
    assert names(one / "artifacts") == names(two / "artifacts")


def test_two_processes_compress_to_one_processs_bytes(alone: Path, tmp_path: Path) -> None:
    _, two = copies(alone, tmp_path, "artifacts/emulator")
    launch(two, "stages/compress.py", fsdp=False)
    for file in (alone / "artifacts/emulator").iterdir():
        assert (two / "artifacts/emulator" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("fsdp", [False, True], ids=["each holds all", "layers are split"])
def test_two_processes_attack_as_one_does(alone: Path, tmp_path: Path, fsdp: bool) -> None:
    small = {"steps": 4, "eval_points": 2, "batch_blocks": 3, "lr": 0.01, "eval_questions": 8}
    attack = {**small, "membership_records": 8, "references": []}
    one, two = copies(alone, tmp_path, "artifacts/attack", attack=attack)
    for folder in (one, two):
        (folder / "studies").mkdir()
        shutil.copy(ROOT / "studies/dvc.yaml", folder / "studies")
    succeed(one, "attack")
    launch(two, "stages/attack.py", fsdp=fsdp)
    first, second = (read(folder, "attack.json") for folder in (one, two))
    ends = [{name: row["perplexity"] for name, row in found["restoration"].items()} for found in (first, second)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-3) and len(ends[0]) == 3
    assert second["weights"] == first["weights"] and second["before"] == first["before"]
    assert names(one / "artifacts") == names(two / "artifacts")


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


def test_each_of_two_processes_holds_half_of_every_layer(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "artifacts/model", tmp_path / "artifacts/model")
    (tmp_path / "halves.py").write_text(HALVES)
    launch(tmp_path, "halves.py")
    for first in (True, False):
        seen = read(tmp_path, f"seen-{first}.json")
        assert seen["same"]
        assert all(share == (0.5 if name.startswith("model.layers.") else 1) for name, share in seen["shares"].items())


def test_rates_and_patience_with_split_layers_are_those_of_one_process(alone: Path, tmp_path: Path) -> None:
    output = OUTPUTS["full_finetune"][0]
    finetune = {"lr": [1e-2, 1e-4], "epochs": 3, "patience": 1, "validation_fraction": 0.3}
    one, two = copies(alone, tmp_path, output, full_finetune=finetune)
    succeed(one, "full_finetune")
    launch(two, "stages/full_finetune.py", "piqa")
    for file in ("tuning.json", "results.json"):
        first, second = (read(folder, f"{output}/{file}") for folder in (one, two))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_lora_inside_split_layers_is_that_of_one_process(alone: Path, tmp_path: Path) -> None:
    tuned = "artifacts/adapters/piqa/lora/adapter"
    lora = {"adapters": ["lora"], "lora": {"rank": 2}, "offsite_tune": {"max_steps": 4}}
    one, two = copies(alone, tmp_path, tuned, **lora)
    assert run(one, "offsite_tune", ["piqa", "lora"]).code == 0
    launch(two, "stages/offsite_tune.py", "piqa", "lora")
    assert_close(one / tuned / "adapter_model.safetensors", two / tuned / "adapter_model.safetensors")


STOP = """
import os, runpy, signal, sys
from scaleot_core.tuning import tuner
measure, seen = tuner.answer_loss, []
def step(*args):
    seen.append(1)
    if len(seen) == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)
    return measure(*args)
tuner.answer_loss = step
sys.argv = ['stages/offsite_tune.py', 'piqa', 'layers']
try: runpy.run_path('stages/offsite_tune.py', run_name='__main__')
except SystemExit as end: assert end.code == 130, end
"""


def test_interrupted_together_and_resumed_together(alone: Path, tmp_path: Path) -> None:
    output = OUTPUTS["offsite_tune"][0]
    _, two = copies(alone, tmp_path, output, checkpoint_seconds=0, offsite_tune={"max_steps": 5, "epochs": 2})
    (two / "stop.py").write_text(STOP)
    launch(two, "stop.py")
    assert not (two / output).exists()
    assert "resuming after step 3" in launch(two, "stages/offsite_tune.py", "piqa", "layers")
    assert len(read(two, f"{output}/history.json")) == 5


def test_one_process_sums_with_no_other() -> None:
    batch, weight = torch.arange(5), torch.nn.Parameter(torch.tensor(2.0))
    assert distributed.world_size() == 1 and distributed.is_main_process()
    assert distributed.all_reduce_sum(2.5) == 2.5 and distributed.any_process(True)
    assert not distributed.any_process(False) and torch.equal(distributed.shard_batch(batch), batch)
    assert gradients.backward(batch.float(), lambda part: weight * part.mean()) == 4.0
    gradients.sum_gradients([weight])
    assert weight.grad == 2.0
