"""What the model owner checks of an adapter that came back: how far it moved, whose model it is of, which channels."""

import json

import pytest
import torch
from helpers import CPU, LORA, PLAN, each_head, each_shape, refusal, tiny_model, write_adapter, write_package

from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.returned import check_adapter, check_base, kept_channels, layer_changes
from scaleot_core.models.families import family
from scaleot_core.tuning.adapters import TunedLayers
from scaleot_core.tuning.lora import lora_features


@pytest.mark.parametrize("lora", [None, LORA], ids=["layers", "lora"])
def test_adapter_that_came_back_is_the_one_that_was_tuned(tmp_path, tokenizer, lora):
    package = Package(write_package(tmp_path / "package", tiny_model("llama"), tokenizer))
    model = package.load(CPU)
    checked = check_adapter(write_adapter(tmp_path / "adapter", model, lora, package), package)
    assert checked.form == lora
    assert [change.layer for change in checked.layer_changes] == ([1] if lora is None else [1, 2, 3])
    if lora is None:
        for name, parameter in layer_parameters(model, PLAN, "adapter").items():
            assert torch.equal(checked.adapter.weights[name], parameter)


@each_shape
def test_how_far_lora_moved_a_layer_is_told_of_the_matrices_that_it_lies_on(name, tmp_path, tokenizer):
    package = Package(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    model = package.load(CPU)
    identities = {key: torch.eye(into) for key, (into, _) in lora_features(model, PLAN, LORA).items()}
    before = {key: model.get_submodule(key)(identity) for key, identity in identities.items()}  # W', and the bias
    bias = {key: model.get_submodule(key)(torch.zeros_like(identity)) for key, identity in identities.items()}
    folder = write_adapter(tmp_path / "adapter", model, LORA, package)
    path = family(model.config).layers
    for change in check_adapter(folder, package).layer_changes:
        keys = [key for key in identities if key.startswith(f"{path}.{change.layer}.")]
        moved = torch.cat([(model.get_submodule(key)(identities[key]) - before[key]).flatten() for key in keys])
        shipped = torch.cat([(before[key] - bias[key]).flatten() for key in keys])
        assert change.relative == pytest.approx(float(moved.norm() / shipped.norm()), rel=1e-3)
        assert 2 < change.outlier < 20


def test_layer_that_did_not_move_has_moved_by_nothing():
    config, prefix = tiny_model("llama").config, "model.layers.1"
    tensors = {f"{prefix}.a": torch.ones(3, 3), f"{prefix}.b": torch.zeros(2)}
    (still,) = layer_changes(TunedLayers(tensors), tensors.items(), PLAN, config)
    assert (still.relative, still.outlier) == (0.0, 0.0)
    tuned = TunedLayers({**tensors, f"{prefix}.b": torch.tensor([4.0, 0.0])})
    (moved,) = layer_changes(tuned, tensors.items(), PLAN, config)
    assert moved.relative == pytest.approx(4 / 3) and moved.outlier == pytest.approx(2**0.5)
    assert moved.tensor == pytest.approx(4 / (9 / 11 * 2) ** 0.5)  # a bias of zeros counts as weights do
    small = {f"{prefix}.a": torch.ones(3, 3), f"{prefix}.b": torch.full((2,), 0.2)}
    (thrown_away,) = layer_changes(TunedLayers({**small, f"{prefix}.b": torch.zeros(2)}), small.items(), PLAN, config)
    assert thrown_away.tensor == pytest.approx(1) and thrown_away.relative < 0.1


@each_shape
@each_head
def test_every_tensor_that_left_as_it_is_tells_whether_the_model_is_the_packages(name, tied, tmp_path, tokenizer):
    package = Package(write_package(tmp_path / "package", tiny_model(name, tie_word_embeddings=tied), tokenizer))
    state = tiny_model(name, tie_word_embeddings=tied).state_dict()
    check_base("base", state.get, package)
    for key, shipped in dict(package.stream("base", "adapter")).items():
        state[key].view(-1)[0] += 1
        assert repr(key) in refusal(check_base, "base", state.get, package)
        state[key].view(-1)[0] = shipped.view(-1)[0]


def test_private_file_says_which_channels_were_kept(tmp_path):
    file, package = tmp_path / "package.private.json", "0" * 64
    assert "--private" in refusal(kept_channels, file, package)
    for content, reason in (
        ({"package": "1" * 64, "channels": {}}, "another package"),
        ([], "another package"),
        ({"package": package}, "which channels"),
        ({"package": package, "channels": {"x": [1]}}, "which channels"),
        ({"package": package, "channels": {"1": ["x"]}}, "which channels"),
    ):
        file.write_text(json.dumps(content))
        assert reason in refusal(kept_channels, file, package)
    file.write_text(json.dumps({"package": package, "channels": {"2": [0, 3]}}))
    assert {i: channels.tolist() for i, channels in kept_channels(file, package).items()} == {2: [0, 3]}
