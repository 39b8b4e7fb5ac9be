"""The ledger counts what packages have of a model exactly, one by one and together."""

import pytest
import torch
from helpers import CONFIGS, make_emulator, pruned_emulator, streamed, tiny_model, write_package

from scaleot_core.compression.channels import channels_of
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.exchange.ledger import channels_left, enter, exact_weights, read_left
from scaleot_core.exchange.package import Package, save
from scaleot_core.models.families import family, feed_forward_paths


@pytest.fixture
def model(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "model", save_original_format=False)
    return streamed(tmp_path / "model")


every_family = pytest.mark.parametrize("model", sorted(CONFIGS), indirect=True)


def pruned_package(folder, name, tokenizer):
    folder.mkdir()
    emulator, plan, kept, real = pruned_emulator(name)
    save(folder, real.config, tokenizer, plan, package_tensors(emulator, plan))
    return Package(folder), kept


def whole_tensors(package, model):
    """Count the numbers of tensors that are the model's bit for bit, naively."""
    shipped = dict(package.stream("base", "adapter", "compressed"))
    pairs = ((tensor, shipped.get(name)) for name, tensor in model.tensors(model.names))
    return sum(a.numel() for a, b in pairs if b is not None and a.shape == b.shape and torch.equal(a, b))


@every_family
def test_all_but_harmonizers_and_cut_projections_is_exact(model, tokenizer, tmp_path, request):
    name = request.node.callspec.params["model"]
    package = Package(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    exact = exact_weights(package, model, {})
    total = sum(tensor.numel() for _, tensor in model.tensors(model.names))
    assert exact.weights == total
    biases = sum(t.numel() for n, t in package.stream("compressed") if ".parts." in n and n.endswith("bias"))
    assert exact.share * total == whole_tensors(package, model) + biases


@every_family
def test_of_pruned_layers_the_rows_of_kept_channels_count(model, tokenizer, tmp_path, request):
    name = request.node.callspec.params["model"]
    package, kept = pruned_package(tmp_path / "package", name, tokenizer)
    exact, names = exact_weights(package, model, kept), family(model.model.config)
    shipped = dict(package.stream("base", "adapter", "compressed"))
    assert exact.share * exact.weights == sum(t.numel() for t in shipped.values())  # here nothing is refitted
    count = channels_of(tiny_model(name), 0)
    left = channels_left(exact, model.model.config, count)
    assert all(torch.equal(left[i], kept.get(i, torch.arange(count))) for i in range(4))
    path = f"{names.layers}.0.{names.feed_forward_out}.weight"
    for inner in feed_forward_paths(model.model.config):  # trained: no longer the model's
        shipped[f"{names.layers}.0.{inner}.weight"] += 1
    (tmp_path / "tuned").mkdir()
    save(tmp_path / "tuned", package.config, tokenizer, package.plan, shipped.items())
    tuned = exact_weights(Package(tmp_path / "tuned"), model, kept)
    assert path not in tuned.tensors and not len(channels_left(tuned, model.model.config, count)[0])


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_union_counts_every_line_once_and_is_kept_by_model(model, tokenizer, tmp_path):
    package, kept = pruned_package(tmp_path / "package", "llama", tokenizer)
    pruned, plain = exact_weights(package, model, kept), tiny_model("llama")
    (tmp_path / "other").mkdir()
    plan = make_emulator(plain)
    save(tmp_path / "other", plain.config, tokenizer, plan, package_tensors(plain, plan))
    other = exact_weights(Package(tmp_path / "other"), model, {})
    union = pruned | other
    assert max(pruned.share, other.share) < union.share < 1 and union == other | pruned | pruned
    lacks = {n for n in model.names if n not in union.tensors}
    assert not lacks
    half = 3 * (64 - 40) * 32  # of layer 0, which the other has a harmonizer for
    assert union.share * union.weights == union.weights - half
    for name, exact in (("one", pruned), ("two", other), ("three", other.model_copy(update={"model": "another"}))):
        enter(tmp_path / "ledger.json", name, exact)
    assert read_left(tmp_path / "ledger.json", pruned.model) == union
    assert read_left(tmp_path / "ledger.json", "unheard of") is None
