"""A package of int8: smaller, the same on both sides whether it stays so or not, and hostile until it was checked."""

import json
import sys

import pytest
import torch
from damages import holds
from helpers import (
    CPU,
    LORA,
    PLAN,
    change_manifest,
    each_shape,
    logits,
    make_emulator,
    plan_of_kinds,
    refused,
    scaleot,
    snapshot,
    tiny_model,
    write_adapter,
    write_package,
)

from scaleot_core.common.files import read_json
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression.emulator import package_tensors, part_of
from scaleot_core.compression.quantization import QuantizedMatrix
from scaleot_core.exchange.package import Package, save
from scaleot_core.exchange.returned import check_adapter, check_base
from scaleot_core.models.families import family

COMPRESSED, TUNED_LORA = "compressed.safetensors", ("--lora-rank", 3)


def write_int8(folder, model, tokenizer, plan=None):
    """`write_package` of int8."""
    folder.mkdir()
    plan = make_emulator(model, plan)
    save(folder, model.config, tokenizer, plan, package_tensors(model, plan), quantized="int8")
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    """The same emulator as a package in full and as one of int8, and records."""
    folder = tmp_path_factory.mktemp("sound")
    write_package(folder / "full", tiny_model("llama"), tokenizer)
    write_int8(folder / "int8", tiny_model("llama"), tokenizer)
    (folder / "records.jsonl").write_text('{"prompt": "count", "completion": " to one"}\n' * 9)
    return folder


@each_shape
def test_package_of_int8_is_near_to_the_full_one_and_exact_where_the_real_model_is_compared(tmp_path, tokenizer, name):
    full = Package(write_package(tmp_path / "full", tiny_model(name), tokenizer))
    small = Package(write_int8(tmp_path / "int8", tiny_model(name), tokenizer))
    small.check()
    assert small.manifest.quantized == "int8" and "quantized" not in read_json(full.folder / "manifest.json")
    parts, path = ("base", "adapter", "harmonizer", "compressed"), family(small.config).layers
    near, exact = dict(small.stream(*parts)), dict(full.stream(*parts))
    assert near.keys() == exact.keys()
    for key, tensor in exact.items():
        is_exact = part_of(key, path, PLAN) in ("base", "adapter") or tensor.dim() != 2 or not tensor.any()
        assert near[key].dtype == tensor.dtype and torch.equal(near[key], tensor) == is_exact
        assert (near[key] - tensor).norm() <= 0.02 * tensor.norm()
    check_base("real", tiny_model(name).state_dict().get, small)
    sizes = [(package.folder / COMPRESSED).stat().st_size for package in (small, full)]
    assert sizes[0] < 0.6 * sizes[1]  # of float32, with headers


def test_package_of_int8_is_the_same_whether_it_stays_so_or_is_quantized_where_it_is_tuned(sound):
    small, full = Package(sound / "int8"), Package(sound / "full")
    models = [small.load(CPU), small.load(CPU, "int8"), full.load(CPU, "int8")]
    are_quantized = [any(isinstance(p, QuantizedMatrix) for p in model.parameters()) for model in models]
    assert are_quantized == [False, True, True]
    assert all(torch.equal(logits(models[0]), logits(model)) for model in models[1:])


def test_shared_layers_of_int8(tmp_path, tokenizer):
    plan = plan_of_kinds(("adapter", "compressed", "shared", "shared"), {2: 1, 3: 1})
    small = Package(write_int8(tmp_path / "int8", tiny_model("llama"), tokenizer, plan))
    assert torch.equal(logits(small.load(CPU)), logits(small.load(CPU, "int8")))


def test_lora_that_was_tuned_on_int8_is_checked_by_its_owner(sound, tmp_path):
    changes = {}
    for name in ("int8", "full"):
        package = Package(sound / name)
        folder = write_adapter(tmp_path / name, package.load(CPU), LORA, package)
        changes[name] = [change.relative for change in check_adapter(folder, package).layer_changes]
    assert changes["int8"] == pytest.approx(changes["full"], rel=1e-3) and all(changes["int8"])


# --- the commands ----------------------------------------------------------------------------------------


def tuning(sound, out, *options, package="full"):
    return ("tune", sound / package, "--data", sound / "records.jsonl", "--out", out, "--threads", 1, *options)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(
    "options", [TUNED_LORA, ("--adapters", "layers"), (*TUNED_LORA, "--epsilon", 8, "--delta", 0.1)]
)
def test_tune_beside_quantized_matrices(sound, tmp_path, form, options):
    if form == "int4":
        pytest.importorskip("bitsandbytes")
    ended = scaleot(*tuning(sound, tmp_path / "out", "--epochs", 2, "--quantize", form, *options), "--json")
    assert ended.code == 0, ended.said
    assert json.loads(ended.out)["steps"] > 0
    assert scaleot("check", tmp_path / "out", "--package", sound / "full").code == 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert {tensor.dtype for tensor in read_tensors(file).values()} == {torch.float32}


def test_package_of_int8_is_tuned_alike_whether_it_stays_so_or_not(sound, tmp_path):
    tuned = []
    for name, options in (("one", ()), ("two", ("--quantize", "int8"))):
        command = tuning(sound, tmp_path / name, "--epochs", 1, *TUNED_LORA, *options, package="int8")
        assert scaleot(*command).code == 0
        tuned.append(read_tensors(tmp_path / name / "adapter_model.safetensors"))
    for key, tensor in tuned[0].items():
        torch.testing.assert_close(tuned[1][key], tensor, rtol=1e-4, atol=1e-6)


def test_quantization_that_is_not_possible_here_is_told_before_anything_is_written(sound, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = tuning(sound, tmp_path / "out", "--quantize")
    assert refused(*command, "int4") == "error: --quantize = 'int4': it needs bitsandbytes: pip install '.[int4]'"
    assert "--quantize = int2: it is not one of 'int8', 'int4'" in refused(*command, "int2")
    assert not list(tmp_path.iterdir())


def test_inspect_says_that_a_package_is_of_int8(sound):
    shown = {name: json.loads(scaleot("inspect", sound / name, "--json").out) for name in ("int8", "full")}
    assert shown["int8"]["quantized"] == "int8" and "quantized" not in shown["full"]


# --- what is refused -------------------------------------------------------------------------------------

MATRIX = "model.layers.2.mlp.up_proj.weight"
SCALES, SCALE, FOREIGN = f"{MATRIX}.scales", f"tensor {MATRIX!r} has a scale of 0, below it or", "is missing, foreign"


def replaced(name, change):
    """Another tensor of that name in the file of compressed layers; None takes it out."""

    def changed(tensors):
        tensor = change(tensors[SCALES])
        return {key: t for key, t in {**tensors, name: tensor}.items() if t is not None}

    return holds(COMPRESSED, changed)


def filled(value):
    return replaced(SCALES, lambda scales: torch.full_like(scales, value))


MALFORMED = {
    "scale that is no number": (filled(float("nan")), SCALE),
    "endless scale": (filled(float("inf")), SCALE),
    "scale of zero": (filled(0.0), SCALE),
    "scale below zero": (filled(-1e-3), SCALE),
    "scale too large for the product": (filled(3e38), SCALE),
    "scales gone": (replaced(SCALES, lambda scales: None), FOREIGN),
    "scales without codes": (replaced(MATRIX, lambda scales: None), FOREIGN),
    "scales of another shape": (replaced(SCALES, lambda scales: scales.T.contiguous()), FOREIGN),
    "scales of another dtype": (replaced(SCALES, torch.Tensor.double), FOREIGN),
    "scales too many": (replaced("model.norm.scales", lambda scales: torch.ones(1, 1)), FOREIGN),
    "matrix in full": (replaced(MATRIX, lambda scales: torch.ones(64, 32)), FOREIGN),
    "int8 denied": (lambda folder: change_manifest(folder, quantized=None), FOREIGN),
    "another form": (lambda folder: change_manifest(folder, quantized="int4"), "quantized: Input should be 'int8'"),
    "form that is none": (lambda folder: change_manifest(folder, quantized=8), "quantized: Input should be 'int8'"),
}


@pytest.mark.parametrize("options", [(), ("--quantize", "int8")])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_package_of_int8_is_refused(sound, tmp_path, tokenizer, case, options):
    damage, reason = MALFORMED[case]
    folder = write_int8(tmp_path / "given", tiny_model("llama"), tokenizer)
    damage(folder)
    before = snapshot(tmp_path)
    line = refused("tune", folder, "--data", sound / "records.jsonl", "--out", tmp_path / "out", *TUNED_LORA, *options)
    assert str(folder) in line and reason in line and snapshot(tmp_path) == before


def test_full_package_that_says_it_is_of_int8_is_refused(tmp_path, tokenizer):
    folder = write_package(tmp_path / "given", tiny_model("llama"), tokenizer)
    change_manifest(folder, quantized="int8")
    assert FOREIGN in refused("inspect", folder)
