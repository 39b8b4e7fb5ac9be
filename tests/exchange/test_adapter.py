"""The adapter that comes back: in full or a normal PEFT adapter, and the same logits whoever loads it."""

import json

import pytest
import torch
from helpers import (
    CPU,
    LORA,
    PLAN,
    Shipped,
    each_family,
    emulator_of,
    form,
    logits,
    refusal,
    snapshot,
    tiny_model,
    write_adapter,
    write_package,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import check_adapter, check_base, kept_channels, layer_changes
from scaleot_core.models.families import family
from scaleot_core.tuning.adapters import TunedLayers, plug_in, trainable, tuned_emulator
from scaleot_core.tuning.lora import lora_features

LORAS = {
    "everywhere": LORA,
    "attention": LORA.model_copy(update={"modules": "attention"}),
    "adapter layers": LORA.model_copy(update={"layers": "adapter"}),
}
each_lora = pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
each_kind = pytest.mark.parametrize("lora", [None, LORA], ids=["layers", "lora"])


def read(folder, name, sha256="0" * 64):
    return adapter_folder.read(folder, Shipped(emulator_of(name), sha256))


@each_family
@each_lora
def test_peft_loads_a_lora_adapter_on_the_real_model_and_gives_the_plug_ins_logits(name, lora, tmp_path):
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
@each_kind
def test_tuned_emulator_is_what_the_adapter_says(name, lora, tmp_path):
    model = emulator_of(name)
    folder = write_adapter(tmp_path / "adapter", model, lora)
    again = emulator_of(name)
    with tuned_emulator(again, PLAN, read(folder, name)):
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(again), logits(emulator_of(name)))


@each_family
@each_lora
def test_lora_trains_only_its_own_matrices_and_starts_at_nothing(name, lora):
    model = emulator_of(name)
    parameters = trainable(model, PLAN, lora, seed=0)
    assert torch.equal(logits(model), logits(emulator_of(name)))
    assert parameters and all(".lora_" in key for key in parameters)
    again = trainable(emulator_of(name), PLAN, lora, seed=0)
    other = trainable(emulator_of(name), PLAN, lora, seed=1)
    assert all(torch.equal(parameters[key], again[key]) for key in parameters)
    assert any(not torch.equal(parameters[key], other[key]) for key in parameters)


@pytest.mark.parametrize("lora", [None, *LORAS.values()], ids=["layers", *LORAS])
def test_same_adapter_gives_the_same_bytes(tmp_path, lora):
    one, two = (write_adapter(tmp_path / name, emulator_of("llama"), lora) for name in ("one", "two"))
    assert snapshot(one) == snapshot(two)


def test_lora_adapter_has_only_what_peft_reads_and_the_manifest(tmp_path):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), LORAS["adapter layers"])
    assert sorted(f.name for f in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 5.0 and config["layers_to_transform"] == [1]
    names = read_tensors(folder / "adapter_model.safetensors")
    assert len(names) == 14 and all(name.startswith("base_model.model.model.layers.1.") for name in names)


def test_adapter_of_another_package_or_other_layers(tmp_path):
    folder = write_adapter(tmp_path / "adapter", emulator_of("llama"), None)
    assert "another package" in refusal(lambda: read(folder, "llama", "1" * 64))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "layers": [2]}))
    assert "its layers are [2]" in refusal(lambda: read(folder, "llama"))


def test_package_without_adapter_layers_takes_lora_alone():
    plan = Plan(("harmonizer", "compressed", "compressed", "compressed"), 0.8, form(8))
    assert "tune it with `lora`" in refusal(trainable, emulator_of("llama", plan), plan, None, 0)
    assert len(trainable(emulator_of("llama", plan), plan, LORA, 0)) == 3 * 7 * 2


@each_kind
def test_check_reads_files_alone(tmp_path, tokenizer, lora):
    package = Package(write_package(tmp_path / "package", tiny_model("llama"), tokenizer))
    model = package.load(CPU)
    folder = write_adapter(tmp_path / "adapter", model, lora, package)
    found = check_adapter(folder, package)
    assert found.form == lora
    assert [moved.layer for moved in found.layer_changes] == ([1] if lora is None else [1, 2, 3])
    if lora is None:
        tuned = found.adapter.weights
        assert all(torch.equal(tuned[key], p) for key, p in layer_parameters(model, PLAN, "adapter").items())
    base, layers = (read_tensors(package.folder / f"{part}.safetensors") for part in ("base", "adapter"))
    shipped = base | layers
    exact = dict(package.stream("base", "adapter"))
    assert exact.keys() == shipped.keys() and all(torch.equal(exact[k], shipped[k]) for k in shipped)


@each_family
def test_how_far_lora_moved_a_layer_is_told_of_the_matrices_that_it_lies_on(name, tmp_path, tokenizer):
    package = Package(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    model = package.load(CPU)
    names = lora_features(model, PLAN, LORA)
    ones = {key: torch.eye(into) for key, (into, _) in names.items()}
    before = {key: model.get_submodule(key)(ones[key]) for key in names}  # W', and the bias
    bias = {key: model.get_submodule(key)(torch.zeros_like(ones[key])) for key in names}
    folder = write_adapter(tmp_path / "adapter", model, LORA, package)
    path = family(model.config).layers
    for moved in check_adapter(folder, package).layer_changes:
        own = [key for key in names if key.startswith(f"{path}.{moved.layer}.")]
        change = torch.cat([(model.get_submodule(key)(ones[key]) - before[key]).flatten() for key in own])
        whole = torch.cat([(before[key] - bias[key]).flatten() for key in own])
        assert moved.relative == pytest.approx(float(change.norm() / whole.norm()), rel=1e-3)
        assert 2 < moved.outlier < 20


def test_layer_that_did_not_move_has_moved_by_nothing():
    config, prefix = tiny_model("llama").config, "model.layers.1"
    tensors = {f"{prefix}.a": torch.ones(3, 3), f"{prefix}.b": torch.zeros(2)}
    (still,) = layer_changes(TunedLayers(tensors), tensors.items(), PLAN, config)
    assert (still.relative, still.outlier) == (0.0, 0.0)
    tuned = TunedLayers({**tensors, f"{prefix}.b": torch.tensor([4.0, 0.0])})
    (moved,) = layer_changes(tuned, tensors.items(), PLAN, config)
    assert moved.relative == pytest.approx(4 / 3) and moved.outlier == pytest.approx(2**0.5)


# --- what belongs to the model owner ---------------------------------------------------------------------


def test_private_file_says_which_channels_were_kept(tmp_path):
    file = tmp_path / "package.private.json"
    assert "--private" in refusal(kept_channels, file, "0" * 64)
    for content, said in (
        ({"package": "1" * 64, "channels": {}}, "another package"),
        ([], "another package"),
        ({"package": "0" * 64}, "which channels"),
        ({"package": "0" * 64, "channels": {"x": [1]}}, "which channels"),
        ({"package": "0" * 64, "channels": {"1": ["x"]}}, "which channels"),
    ):
        file.write_text(json.dumps(content))
        assert said in refusal(kept_channels, file, "0" * 64)
    file.write_text(json.dumps({"package": "0" * 64, "channels": {"2": [0, 3]}}))
    assert {i: kept.tolist() for i, kept in kept_channels(file, "0" * 64).items()} == {2: [0, 3]}


@each_family
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_tensor_that_left_as_it_is_tells_whether_the_model_is_the_packages(name, tied, tmp_path, tokenizer):
    package = Package(write_package(tmp_path / "package", tiny_model(name, tie_word_embeddings=tied), tokenizer))
    real = tiny_model(name, tie_word_embeddings=tied)
    state = real.state_dict()
    check_base("base", state.get, package)
    for key, shipped in dict(package.stream("base", "adapter")).items():
        state[key].view(-1)[0] += 1
        assert repr(key) in refusal(check_base, "base", state.get, package)
        state[key].view(-1)[0] = shipped.view(-1)[0]
