"""What takes more memory than there is ends before it starts, with what would fit."""

import pytest
import torch
from helpers import CPU, make_emulator, refusal, refused, run, succeed, tiny_model, write_package, write_project

from scaleot_core import memory
from scaleot_core.artifacts import Artifacts
from scaleot_core.common.runtime import Runtime
from scaleot_core.common.tensors import write_tensors
from scaleot_core.exchange.package import Package
from scaleot_core.memory import check_stage, device_memory, stage_bytes, tuning_bytes

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
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    limit.write_text("max\n")
    assert device_memory(CPU, tmp_path) == whole
    limit.write_text("1000000\n")
    assert device_memory(CPU, tmp_path) == 1_000_000
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("900000\n")
    assert device_memory(CPU, tmp_path) == 900_000


def test_stage_takes_the_model_and_16_bytes_of_each_weight_that_is_trained(artifacts):
    model = tiny_model("llama")
    weights = 4 * sum(p.numel() for p in model.parameters())
    taken = {stage: stage_bytes(stage, ITEMS.get(stage, {}), artifacts, torch.float32) for stage in COUNTED}
    assert taken["zero_shot"] == taken["evaluate"] == pytest.approx(weights, rel=0.1)  # of headers
    assert taken["full_finetune"] == 4 * taken["zero_shot"]
    assert taken["train_harmonizers"] - taken["zero_shot"] == pytest.approx(100 * 16, abs=16 * 30)
    assert stage_bytes("compress", {}, artifacts, torch.float32) == 0  # it streams


def test_tuning_takes_the_emulator_as_it_is_kept(artifacts, tmp_path):
    package = Package(artifacts.emulator)
    emulator = tiny_model("llama")
    make_emulator(emulator)
    whole, layers = (tuning_bytes(package, whole_layers=trained) for trained in (False, True))
    assert whole == 4 * sum(p.numel() for p in emulator.parameters())
    assert layers - whole == 16 * sum(p.numel() for p in emulator.model.layers[1].parameters())
    kept = [tuning_bytes(package, whole_layers=False, frozen=frozen) for frozen in ("int8", "int4")]
    assert whole > kept[0] > kept[1] > 0


@pytest.mark.parametrize("stage", COUNTED)
def test_stage_that_fits_is_let_through_and_one_that_doesnt_is_refused(stage, artifacts, monkeypatch):
    item = ITEMS.get(stage, {})
    need = stage_bytes(stage, item, artifacts, torch.float32)
    monkeypatch.setattr(memory, "device_memory", lambda device: need)
    check_stage(stage, item, artifacts, HERE)
    monkeypatch.setattr(memory, "device_memory", lambda device: 0.6 * need)
    said = refusal(check_stage, stage, item, artifacts, HERE)
    assert said.startswith(f"{stage}: it takes at least ") and "GiB" in said
    half = stage not in ("full_finetune", "attack")
    assert said.endswith("with dtype = bfloat16 it fits" if half else "or a model of 60% of the size")


@pytest.mark.parametrize("stage", COUNTED)
def test_what_gpus_can_split_is_told_how_many_it_takes(stage, artifacts, monkeypatch):
    item, gpu = ITEMS.get(stage, {}), Runtime(torch.device("cuda"), torch.bfloat16)
    need = stage_bytes(stage, item, artifacts, torch.bfloat16)
    monkeypatch.setattr(memory, "device_memory", lambda device: 0.3 * need)
    said = refusal(check_stage, stage, item, artifacts, gpu)
    assert "the GPU has" in said
    assert ("with `launch` over 4 such GPUs its layers fit" in said) == (stage in memory.SPLIT)
    monkeypatch.setenv("WORLD_SIZE", "4")
    if stage in memory.SPLIT:
        check_stage(stage, item, artifacts, gpu)
    else:  # each process would have all of it
        refusal(check_stage, stage, item, artifacts, gpu)


def test_processes_of_one_machine_share_its_memory(artifacts, monkeypatch):
    need = stage_bytes("full_finetune", {}, artifacts, torch.float32)
    monkeypatch.setattr(memory, "device_memory", lambda device: 0.6 * need)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "a machine with" in refusal(check_stage, "full_finetune", {}, artifacts, HERE)


def test_data_owner_is_told_what_would_fit(artifacts, tmp_path, monkeypatch):
    """Before the package's tensors are read."""
    package = Package(artifacts.emulator)
    need = {form: tuning_bytes(package, whole_layers=False, frozen=form) for form in (None, "int8", "int4")}
    (tmp_path / "records.jsonl").write_text('{"text": "a"}\n')
    command = ("tune", artifacts.emulator, "--data", tmp_path / "records.jsonl", "--out", tmp_path / "adapter")
    for have, fits in ((need["int8"], "with --frozen int8 it fits"), (need["int4"], "with --frozen int4 it fits")):
        monkeypatch.setattr(memory, "device_memory", lambda device, have=have: have)
        said = refused(*command)
        assert "tuning this package takes at least" in said and fits in said
    monkeypatch.setattr(memory, "device_memory", lambda device: 10)
    assert "a machine with" in refused(*command, "--frozen", "int8")


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
