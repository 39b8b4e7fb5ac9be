"""The adapter that goes back: in full or a normal PEFT adapter, and the same logits whoever loads it."""

import json

import pytest
import torch
from helpers import (
    LORA,
    PLAN,
    Shipped,
    close,
    each_family,
    each_shape,
    emulator_of,
    list_again,
    logits,
    refusal,
    snapshot,
    tiny_model,
    write_adapter,
)
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from scaleot_core.common.tensors import read_tensors
from scaleot_core.exchange import adapter_folder
from scaleot_core.tuning.adapters import plug_in, tuned_emulator

ATTENTION = LORA.model_copy(update={"modules": "attention"})
ADAPTER_LAYERS = LORA.model_copy(update={"layers": "adapter"})


def read(folder, name, sha256="0" * 64):
    return adapter_folder.read(folder, Shipped(emulator_of(name), sha256))


def check_peft_loads(folder, name):
    plugged, untuned = tiny_model(name), tiny_model(name)
    plug_in(plugged, PLAN, read(folder, name))
    untuned.save_pretrained(folder.parent / "base")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder.parent / "base"), folder)
    close(logits(loaded), logits(plugged))
    assert (logits(plugged) - logits(untuned)).abs().max() > 5e-4
    close(logits(loaded.merge_and_unload()), logits(plugged))


@each_family
def test_peft_loads_a_lora_adapter_on_the_real_model_and_gives_the_plug_ins_logits(name, tmp_path):
    check_peft_loads(write_adapter(tmp_path / "adapter", emulator_of(name), LORA), name)


@pytest.mark.parametrize("lora", [ATTENTION, ADAPTER_LAYERS], ids=["attention", "adapter layers"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_loads_lora_that_lies_in_some_matrices_alone(name, lora, tmp_path):
    check_peft_loads(write_adapter(tmp_path / "adapter", emulator_of(name), lora), name)


@each_shape
@pytest.mark.parametrize("lora", [None, LORA], ids=["layers", "lora"])
def test_tuned_emulator_is_what_the_adapter_says(name, lora, tmp_path):
    model, again = emulator_of(name), emulator_of(name)
    folder = write_adapter(tmp_path / "adapter", model, lora)
    with tuned_emulator(again, PLAN, read(folder, name)):
        close(logits(again), logits(model))
    assert torch.equal(logits(again), logits(emulator_of(name)))


@pytest.mark.parametrize("lora", [None, LORA, ATTENTION, ADAPTER_LAYERS])
def test_same_adapter_gives_the_same_bytes(tmp_path, lora):
    first = write_adapter(tmp_path / "first", emulator_of("llama"), lora)
    second = write_adapter(tmp_path / "second", emulator_of("llama"), lora)
    assert snapshot(first) == snapshot(second)


def test_lora_adapter_has_only_what_peft_reads_and_the_manifest(tmp_path):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), ADAPTER_LAYERS)
    assert snapshot(folder).keys() == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 5.0 and config["layers_to_transform"] == [1]
    names = read_tensors(folder / "adapter_model.safetensors")
    assert len(names) == 14 and all(name.startswith("base_model.model.model.layers.1.") for name in names)


def test_adapter_of_another_package_or_other_layers_is_refused(tmp_path):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), None)
    assert "another package" in refusal(read, folder, "llama", "1" * 64)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "layers": [2]}))
    assert "its layers are [2]" in refusal(read, folder, "llama")


@pytest.mark.parametrize("stated", ["ours", "whole", "of another version"])
def test_adapter_is_read_whichever_version_of_peft_wrote_its_configuration(stated, tmp_path):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), LORA)
    file = folder / "adapter_config.json"
    assert json.loads(file.read_text()).keys() == set(adapter_folder.LORA_SETTINGS)
    if stated != "ours":
        new = {"new_group_size": 16, "new_kind": None} if stated == "of another version" else {}
        file.write_text(json.dumps({**LoraConfig().to_dict(), **json.loads(file.read_text()), **new}, default=list))
        list_again(folder, file.name)
    check_peft_loads(folder, "llama")


@pytest.mark.parametrize(
    "changes", [{"new": True}, {"new": "name"}, {"new": ["name"]}, {"use_rslora": True}, {"r": None}]
)
def test_setting_that_could_turn_something_on_is_refused(changes, tmp_path):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), LORA)
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    list_again(folder, file.name)
    assert f"`{next(iter(changes))}` is not what such an adapter has" in refusal(read, folder, "llama")
