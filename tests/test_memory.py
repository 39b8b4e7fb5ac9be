"""What takes more memory than there is ends before it starts, with what would fit."""

import psutil
import pytest
import torch
from helpers import CPU, make_emulator, refusal, refused, run, succeed, tiny_model, write_package, write_project

from scaleot_core import memory
from scaleot_core.artifacts import Artifacts
from scaleot_core.common.files import folder_bytes
from scaleot_core.common.runtime import Runtime
from scaleot_core.common.tensors import write_tensors
from scaleot_core.exchange.package import Package
from scaleot_core.memory import Weights, check_stage, device_memory, stage_weights, tuning_weights
from scaleot_core.training.optimizer import Optimizer

HERE = Runtime(CPU, torch.float32)
ITEMS = {"offsite_tune": {"task": "piqa", "adapters": "layers"}}
COUNTED = ("layer_importance", "train_harmonizers", "offsite_tune", "full_finetune", "zero_shot", "evaluate", "attack")


@pytest.fixture
def artifacts(tmp_path, tokenizer):
    """What the stages read, of a tiny model."""
    found = Artifacts(tmp_path / "artifacts")
    tiny_model("llama").save_pretrained(found.model)
    write_package(found.emulator, tiny_model("llama"), tokenizer)
    found.importance.mkdir()
    write_tensors(found.importance / "harmonizers.safetensors", {"0.up.weight": torch.zeros(100)})
    return found


def test_memory_is_that_of_the_machine_or_less_where_a_container_says_so(tmp_path):
    whole = device_memory(CPU, tmp_path)
    assert whole > 2**28
    job = tmp_path / "sys/fs/cgroup/slurm/job"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job\n")
    for folder, limits, expected in (
        (job, {"memory.max": "max", "memory.swap.max": "0"}, whole),
        (job.parent, {"memory.max": "1000000", "memory.swap.max": "5000"}, 1_005_000),
        (job, {"memory.max": "900000"}, 900_000),
    ):
        for name, limit in limits.items():
            (folder / name).write_text(f"{limit}\n")
        assert device_memory(CPU, tmp_path) == expected


def test_memory_of_a_container_of_the_older_kind(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:cpu,cpuacct:/\n2:memory:/docker/not-seen-from-inside\n")
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("800000\n")
    assert device_memory(CPU, tmp_path) == 800_000 + psutil.swap_memory().total  # of which it says nothing


def test_stage_takes_the_model_and_what_training_adds_to_each_weight(artifacts):
    weights = sum(p.numel() for p in tiny_model("llama").parameters())
    found = {stage: stage_weights(stage, ITEMS.get(stage, {}), artifacts, torch.float32) for stage in COUNTED}
    assert found["zero_shot"] == found["evaluate"] == found["layer_importance"]
    assert found["zero_shot"].held == pytest.approx(weights, rel=0.1) and not found["zero_shot"].trained  # of headers
    assert found["full_finetune"].trained == found["full_finetune"].held == found["zero_shot"].held
    assert found["train_harmonizers"].trained == pytest.approx(100, abs=30)
    assert found["attack"].trained == folder_bytes(artifacts.emulator, ".safetensors") / 4
    assert found["offsite_tune"] == tuning_weights(Package(artifacts.emulator), whole_layers=True)
    assert stage_weights("compress", {}, artifacts, torch.float32) == Weights()  # it streams


@pytest.mark.parametrize(("dtype", "trained"), [(torch.float32, 16), (torch.bfloat16, 18)])
def test_trained_weight_takes_its_master_its_gradient_and_two_moments(dtype, trained):
    """As the optimizer has them: it counts what it holds."""
    assert Weights(held=7, trained=3).bytes(dtype) == 4 * dtype.itemsize + 3 * trained
    parameter = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = Optimizer({"a": parameter})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    held = {t.data_ptr(): t.nbytes for t in [parameter, *optimizer.tensors().values()] if t.numel() == 5}
    assert sum(held.values()) + 5 * 4 == Weights(held=5, trained=5).bytes(dtype)  # and the gradient in float32


def test_tuning_takes_the_emulator_as_it_is_kept(artifacts):
    package, emulator = Package(artifacts.emulator), tiny_model("llama")
    make_emulator(emulator)
    layers = tuning_weights(package, whole_layers=True)
    assert layers.held == sum(p.numel() for p in emulator.parameters())
    assert layers.trained == sum(p.numel() for p in emulator.model.layers[1].parameters())
    whole, int8, int4 = (tuning_weights(package, whole_layers=False, quantize=form) for form in (None, "int8", "int4"))
    assert layers.held == whole.held > int8.held > int4.held > 0 and not whole.trained


@pytest.mark.parametrize("stage", COUNTED)
def test_stage_that_fits_is_let_through_and_one_that_doesnt_is_refused(stage, artifacts, monkeypatch):
    item = ITEMS.get(stage, {})
    weights = stage_weights(stage, item, artifacts, torch.float32)
    need, halved = weights.bytes(torch.float32), weights.bytes(torch.bfloat16)
    monkeypatch.setattr(memory, "device_memory", lambda device: need)
    check_stage(stage, item, artifacts, HERE)
    monkeypatch.setattr(memory, "device_memory", lambda device: halved)
    if halved < need:
        said = refusal(check_stage, stage, item, artifacts, HERE)
        assert said.startswith(f"{stage}: it takes at least ") and said.endswith("with dtype = bfloat16 it fits")
    monkeypatch.setattr(memory, "device_memory", lambda device: 0.4 * min(need, halved))
    said = refusal(check_stage, stage, item, artifacts, HERE)
    assert " GiB fits, or a model of " in said and "this machine has" in said


@pytest.mark.parametrize("stage", COUNTED)
def test_what_gpus_can_split_is_told_how_many_it_takes(stage, artifacts, monkeypatch):
    item, gpu = ITEMS.get(stage, {}), Runtime(torch.device("cuda"), torch.bfloat16)
    need = stage_weights(stage, item, artifacts, torch.bfloat16).bytes(torch.bfloat16)
    monkeypatch.setattr(memory, "device_memory", lambda device: 0.3 * need)
    said = refusal(check_stage, stage, item, artifacts, gpu)
    assert "the GPU has" in said
    assert ("with `launch` over 4 such GPUs and --use_fsdp its layers fit" in said) == (stage in memory.SPLIT)
    monkeypatch.setenv("WORLD_SIZE", "4")
    refusal(check_stage, stage, item, artifacts, gpu)  # each has all of it
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if stage in memory.SPLIT:
        check_stage(stage, item, artifacts, gpu)
    else:
        refusal(check_stage, stage, item, artifacts, gpu)


def test_processes_of_one_machine_each_hold_the_model_in_its_memory(artifacts, monkeypatch):
    need = stage_weights("full_finetune", {}, artifacts, torch.float32).bytes(torch.float32)
    monkeypatch.setattr(memory, "device_memory", lambda device: 2 * need)
    check_stage("full_finetune", {}, artifacts, HERE)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "a machine with" in refusal(check_stage, "full_finetune", {}, artifacts, HERE)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_stage("full_finetune", {}, artifacts, HERE)


def test_data_owner_is_told_what_would_fit(artifacts, tmp_path, monkeypatch):
    """Before the package's tensors are read."""
    package = Package(artifacts.emulator)
    need = {
        form: tuning_weights(package, whole_layers=False, quantize=form).bytes(torch.float32)
        for form in ("int8", "int4")
    }
    (tmp_path / "records.jsonl").write_text('{"text": "a"}\n')
    command = ("tune", artifacts.emulator, "--data", tmp_path / "records.jsonl", "--out", tmp_path / "adapter")
    for have, fits in ((need["int8"], "with --quantize int8 it fits"), (need["int4"], "with --quantize int4 it fits")):
        monkeypatch.setattr(memory, "device_memory", lambda device, have=have: have)
        said = refused(*command)
        assert "tuning this package takes at least" in said and fits in said
    monkeypatch.setattr(memory, "device_memory", lambda device: 10)
    assert "a machine with" in refused(*command, "--quantize", "int8")


@pytest.mark.slow
def test_stage_ends_before_it_starts_and_was_foretold_by_the_first(tmp_path, tokenizer, monkeypatch):
    write_project(tmp_path, tokenizer)
    succeed(tmp_path, "sources")
    with monkeypatch.context() as patch:
        patch.setattr(memory, "device_memory", lambda device: 1000)
        said = " ".join(succeed(tmp_path, "prepare_data"))
    assert "layer_importance: it takes at least" in said and "full_finetune: it takes at least" in said
    monkeypatch.setattr(memory, "device_memory", lambda device: 1000)
    ended = run(tmp_path, "layer_importance")
    assert ended.code == 1 and "layer_importance: it takes at least" in " ".join(ended.said)
    assert not (tmp_path / "artifacts/importance").exists()
