"""A package of int8: smaller, the same on both sides whether it stays so or not, and hostile until it was checked."""

import json
import sys

import pytest
import torch
from helpers import (
    CPU,
    PLAN,
    change_manifest,
    each_family,
    list_again,
    logits,
    make_emulator,
    refused,
    scaleot,
    snapshot,
    tiny_model,
    write_adapter,
    write_package,
)

from scaleot_core.common.files import read_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.emulator import package_tensors, part_of
from scaleot_core.compression.plan import Plan
from scaleot_core.compression.quantization import QuantizedMatrix
from scaleot_core.exchange.package import Package, save
from scaleot_core.exchange.returned import check_adapter, check_base
from scaleot_core.models.families import family
from scaleot_core.settings import LoraForm

FORM = LoraForm(rank=3, alpha=5.0)
COMPRESSED = "compressed.safetensors"


def write_int8(folder, model, tokenizer, plan=PLAN):
    """`write_package` of int8."""
    folder.mkdir()
    make_emulator(model, plan)
    save(folder, model.config, tokenizer, plan, package_tensors(model, plan), quantized="int8")
    return folder


@each_family
def test_package_of_int8_is_near_to_the_whole_one_and_exact_where_the_real_model_is_compared(tmp_path, tokenizer, name):
    whole = Package(write_package(tmp_path / "whole", tiny_model(name), tokenizer))
    small = Package(write_int8(tmp_path / "small", tiny_model(name), tokenizer))
    small.check()
    assert small.manifest.quantized == "int8" and whole.manifest.quantized is None
    assert "quantized" not in read_json(whole.folder / "manifest.json")
    parts, path = ("base", "adapter", "harmonizer", "compressed"), family(small.config).layers
    given, expected = dict(small.stream(*parts)), dict(whole.stream(*parts))
    assert given.keys() == expected.keys()
    for key, tensor in expected.items():
        exact = part_of(key, path, PLAN) in ("base", "adapter") or tensor.dim() != 2
        assert given[key].dtype == tensor.dtype and torch.equal(given[key], tensor) == (exact or not tensor.any())
        assert (given[key] - tensor).norm() <= 0.02 * tensor.norm()
    check_base("real", tiny_model(name).state_dict().get, small)
    sizes = [(package.folder / COMPRESSED).stat().st_size for package in (small, whole)]
    assert sizes[0] < 0.6 * sizes[1]  # of float32, with headers


def test_package_of_int8_is_the_same_whether_it_stays_so_or_not(tmp_path, tokenizer):
    """And the same as one that is quantized where it is tuned."""
    small = Package(write_int8(tmp_path / "small", tiny_model("llama"), tokenizer))
    whole = Package(write_package(tmp_path / "whole", tiny_model("llama"), tokenizer))
    loaded = [small.load(CPU), small.load(CPU, "int8"), whole.load(CPU, "int8")]
    kinds = [any(isinstance(p, QuantizedMatrix) for p in model.parameters()) for model in loaded]
    assert kinds == [False, True, True]
    assert torch.equal(logits(loaded[0]), logits(loaded[1])) and torch.equal(logits(loaded[1]), logits(loaded[2]))


def test_shared_layers_of_int8(tmp_path, tokenizer):
    plan = Plan(("adapter", "compressed", "shared", "shared"), 0.8, PLAN.harmonizer, like={2: 1, 3: 1})
    small = Package(write_int8(tmp_path / "small", tiny_model("llama"), tokenizer, plan))
    assert torch.equal(logits(small.load(CPU)), logits(small.load(CPU, "int8")))


def test_lora_that_was_tuned_on_int8_is_checked_by_its_owner(tmp_path, tokenizer):
    small = Package(write_int8(tmp_path / "small", tiny_model("llama"), tokenizer))
    whole = Package(write_package(tmp_path / "whole", tiny_model("llama"), tokenizer))
    moved = []
    for package in (small, whole):
        folder = write_adapter(tmp_path / f"lora-{package.folder.name}", package.load(CPU), FORM, package)
        moved.append([change.relative for change in check_adapter(folder, package).layer_changes])
    assert moved[0] == pytest.approx(moved[1], rel=1e-3) and all(moved[0])


# --- the commands ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    """Packages whole and of int8, and records."""
    folder = tmp_path_factory.mktemp("sound")
    write_package(folder / "whole", tiny_model("llama"), tokenizer)
    write_int8(folder / "small", tiny_model("llama"), tokenizer)
    (folder / "records.jsonl").write_text('{"prompt": "count", "completion": " to one"}\n' * 9)
    return folder


def tuning(sound, out, *options, package="whole"):
    return ("tune", sound / package, "--data", sound / "records.jsonl", "--out", out, "--threads", 1, *options)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(
    "options", [("--lora-rank", 3), ("--adapters", "layers"), ("--lora-rank", 3, "--epsilon", 8, "--delta", 0.1)]
)
def test_tune_beside_quantized_matrices(sound, tmp_path, form, options):
    if form == "int4":
        pytest.importorskip("bitsandbytes")
    ended = scaleot(*tuning(sound, tmp_path / "out", "--epochs", 2, "--quantize", form, *options), "--json")
    assert ended.code == 0, ended.said
    assert json.loads(ended.out)["steps"] > 0
    assert scaleot("check", tmp_path / "out", "--package", sound / "whole").code == 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert {tensor.dtype for tensor in read_tensors(file).values()} == {torch.float32}


def test_package_of_int8_is_tuned_alike_whether_it_stays_so_or_not(sound, tmp_path):
    for name, options in (("one", ()), ("two", ("--quantize", "int8"))):
        command = tuning(sound, tmp_path / name, "--epochs", 1, "--lora-rank", 3, *options, package="small")
        assert scaleot(*command).code == 0
    one, two = (read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-6)


def test_quantization_that_is_not_possible_here_is_told_before_anything_is_written(sound, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = tuning(sound, tmp_path / "out")
    said = refused(*command, "--quantize", "int4")
    assert said == "error: --quantize = 'int4': it needs bitsandbytes: pip install '.[int4]'"
    assert "--quantize = int2: it is not one of 'int8', 'int4'" in refused(*command, "--quantize", "int2")
    assert not list(tmp_path.iterdir())


def test_inspect_says_that_a_package_is_of_int8(sound):
    found = scaleot("inspect", sound / "small", "--json")
    assert json.loads(found.out)["quantized"] == "int8"
    assert "quantized" not in json.loads(scaleot("inspect", sound / "whole", "--json").out)


def holds(change):
    """Other tensors in the file of compressed layers, listed with its new hash."""

    def damage(folder):
        tensors = read_tensors(folder / COMPRESSED)
        name = min(key for key in tensors if key.endswith(".scales"))
        change(tensors, name)
        write_tensors(folder / COMPRESSED, tensors)
        list_again(folder, COMPRESSED)

    return damage


def fills(value):
    def change(tensors, name):
        tensors[name][1] = value

    return holds(change)


MALFORMED = {
    "scale that is no number": fills(float("nan")),
    "endless scale": fills(float("inf")),
    "scale of zero": fills(0.0),
    "scale below zero": fills(-1e-3),
    "scale too large for the product": fills(3e38),
    "scales gone": holds(lambda tensors, name: tensors.pop(name)),
    "scales without codes": holds(lambda tensors, name: tensors.pop(name.removesuffix(".scales"))),
    "scales of another shape": holds(lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()})),
    "scales of another dtype": holds(lambda tensors, name: tensors.update({name: tensors[name].double()})),
    "scales too many": holds(lambda tensors, name: tensors.update({"model.norm.scales": torch.ones(1, 1)})),
    "matrix that is whole": holds(
        lambda tensors, name: tensors.update({name.removesuffix(".scales"): torch.ones(16, 32)})
    ),
    "int8 denied": lambda folder: change_manifest(folder, quantized=None),
    "another form": lambda folder: change_manifest(folder, quantized="int4"),
    "form that is none": lambda folder: change_manifest(folder, quantized=8),
}


@pytest.mark.parametrize("quantize", [(), ("--quantize", "int8")])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_package_of_int8_is_refused(sound, tmp_path, tokenizer, case, quantize):
    folder = write_int8(tmp_path / "given", tiny_model("llama"), tokenizer)
    MALFORMED[case](folder)
    before = snapshot(tmp_path)
    command = ("tune", folder, "--data", sound / "records.jsonl", "--out", tmp_path / "out", "--lora-rank", 3)
    said = refused(*command, "--threads", 1, *quantize)
    assert str(folder) in said and len(said) < 600 and snapshot(tmp_path) == before


def test_whole_package_that_says_it_is_of_int8_is_refused(sound, tmp_path, tokenizer):
    folder = write_package(tmp_path / "given", tiny_model("llama"), tokenizer)
    change_manifest(folder, quantized="int8")
    assert "missing, foreign or of the wrong shape or dtype" in refused("inspect", folder)
