"""The adapter that comes back: in full or a normal PEFT adapter, and the same logits whoever loads it."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CPU,
    IDS,
    PLAN,
    each_family,
    emulator_of,
    refusal,
    snapshot,
    tiny_model,
    write_adapter,
    write_package,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression.emulator import layer_parameters, plug_in
from scaleot_core.exchange import adapter
from scaleot_core.exchange.manifest import manifest_sha256
from scaleot_core.exchange.package import Package


@pytest.fixture
def lora(params):
    return params.offsite_tune.model_copy(update={"peft": "lora", "lora_rank": 3, "lora_alpha": 5.0})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def read(folder, name, package="0" * 64):
    model = emulator_of(name)
    originals = layer_parameters(model, PLAN, "adapter")
    shipped = SimpleNamespace(meta_model=model, plan=PLAN, adapter_tensors=originals, sha256=package)
    return adapter.read(folder, shipped)


@each_family
def test_peft_loads_a_lora_adapter_on_the_real_model_and_gives_the_plug_ins_logits(name, tmp_path, lora):
    folder = write_adapter(tmp_path / "adapter", emulator_of(name), lora)
    plugged = tiny_model(name)
    plug_in(plugged, PLAN, read(folder, name))
    tiny_model(name).save_pretrained(tmp_path / "base")
    real = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(real, folder)
    torch.testing.assert_close(logits(loaded), logits(plugged), rtol=1e-4, atol=1e-5)
    assert (logits(plugged) - logits(tiny_model(name))).abs().max() > 5e-4
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(plugged), rtol=1e-4, atol=1e-5)


@each_family
def test_tuned_emulator_is_what_the_adapter_says(name, tmp_path, params, lora):
    for tuning in (params.offsite_tune, lora):
        model = emulator_of(name)
        folder = write_adapter(tmp_path / tuning.peft, model, tuning)
        again = emulator_of(name)
        plug_in(again, PLAN, read(folder, name))
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@each_family
def test_lora_trains_only_its_own_matrices_in_the_adapter_layers_and_starts_at_nothing(name, lora):
    model = emulator_of(name)
    parameters = adapter.trainable(model, PLAN, lora, seed=0)
    assert torch.equal(logits(model), logits(emulator_of(name)))
    assert parameters and all(".lora_" in key and f".{1}." in key for key in parameters)
    again = adapter.trainable(emulator_of(name), PLAN, lora, seed=0)
    other = adapter.trainable(emulator_of(name), PLAN, lora, seed=1)
    assert all(torch.equal(parameters[key], again[key]) for key in parameters)
    assert any(not torch.equal(parameters[key], other[key]) for key in parameters)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_same_adapter_gives_the_same_bytes(tmp_path, params, lora, method):
    tuning = lora if method == "lora" else params.offsite_tune
    one, two = (write_adapter(tmp_path / name, emulator_of("llama"), tuning) for name in ("one", "two"))
    assert snapshot(one) == snapshot(two)


def test_lora_adapter_has_only_what_peft_reads_and_the_manifest(tmp_path, lora):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), lora)
    assert sorted(f.name for f in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 5.0 and config["layers_to_transform"] == [1]
    names = read_tensors(folder / "adapter_model.safetensors")
    assert len(names) == 14 and all(name.startswith("base_model.model.model.layers.1.") for name in names)


def test_adapter_of_another_package_or_other_layers(tmp_path, params):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), params.offsite_tune)
    assert "another package" in refusal(lambda: read(folder, "llama", package="1" * 64))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "layers": [2]}))
    assert "its layers are [2]" in refusal(lambda: read(folder, "llama"))


def test_receive_reads_files_alone(tmp_path, tokenizer, params):
    package = write_package(tmp_path / "package", tiny_model("llama"), tokenizer)
    model = Package(package).load(CPU)
    folder = write_adapter(tmp_path / "adapter", model, params.offsite_tune, package=manifest_sha256(package))
    found = adapter.check_adapter(folder, Package(package))
    assert [moved.layer for moved in found.layer_changes] == [1]
    assert all(torch.equal(found.tuned[key], p) for key, p in layer_parameters(model, PLAN, "adapter").items())
    on_disk, shipped = read_tensors(package / "adapter.safetensors"), Package(package).adapter_tensors
    assert shipped.keys() == on_disk.keys() and all(torch.equal(shipped[k], on_disk[k]) for k in on_disk)


def test_layer_that_did_not_move_has_moved_by_nothing():
    tensors = {"layers.1.a": torch.ones(3, 3), "layers.1.b": torch.zeros(2)}
    (still,) = adapter.layer_changes(PLAN, tensors, tensors, "layers")
    assert (still.relative, still.outlier) == (0.0, 0.0)
    (moved,) = adapter.layer_changes(PLAN, tensors, {**tensors, "layers.1.b": torch.tensor([4.0, 0.0])}, "layers")
    assert moved.relative == pytest.approx(4 / 3) and moved.outlier == pytest.approx(2**0.5)
