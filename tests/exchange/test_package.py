"""A package that is whole, sufficient, and refused when it isn't."""

import shutil
import socket

import pytest
import torch
from helpers import (
    CPU,
    IDS,
    KINDS,
    PLAN,
    SHAPES,
    change_manifest,
    each_family,
    each_head,
    each_shape,
    list_again,
    make_emulator,
    plan_of,
    refusal,
    snapshot,
    tiny_model,
    write_package,
)

from scaleot_core.common.files import read_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.exchange.package import Package, save
from scaleot_core.models.families import attention, context_length, decoder_layers, family
from scaleot_core.models.loading import load_model, load_tokenizer


def shipped(folder):
    """Every tensor of a package."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_tensors(file).items()}


@each_family
@each_head
def test_package_gives_the_same_emulator_back(tmp_path, tokenizer, name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    plan = plan_of(model)
    folder = write_package(tmp_path / "package", model, tokenizer)
    loaded = Package(folder).load(CPU)
    assert Package(folder).plan == plan
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor) and loaded.state_dict()[key].dtype == tensor.dtype
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert ("lm_head.weight" in shipped(folder)) == (not tied)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_shape
def test_data_owner_needs_nothing_but_the_package(tmp_path, tokenizer, monkeypatch, name, dtype):
    """No other file of the project is there, and no network."""
    tiny_model(name).save_pretrained(tmp_path / "owner" / "model")
    model = load_model(tmp_path / "owner" / "model", device=CPU, dtype=dtype)
    write_package(tmp_path / "owner" / "package", model, tokenizer)
    shutil.move(tmp_path / "owner" / "package", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "owner")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", lambda *args, **options: pytest.fail("a connection was tried"))
    loaded = Package(tmp_path / "elsewhere").load(CPU)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert load_tokenizer(tmp_path / "elsewhere")("some text")["input_ids"] == tokenizer("some text")["input_ids"]


@pytest.mark.parametrize("beta", [0.8, 0.1])  # as two factors, and as one dense matrix
@each_shape
def test_no_attention_matrix_leaves_at_full_rank_but_those_of_adapters(tmp_path, tokenizer, name, beta):
    model, emulator = tiny_model(name), tiny_model(name)
    package = shipped(write_package(tmp_path / "package", emulator, tokenizer, plan_of(model, beta=beta)))
    for i, kind in enumerate(KINDS):
        block = attention(model.config, decoder_layers(model)[i])
        for projection, shapes in SHAPES[name].items():
            weight = block.get_submodule(projection).weight
            matrix = weight.T if family(model.config).transposed else weight
            parts = [weight, weight.T, *matrix.split([shape[0] for shape in shapes])]
            is_shipped = any(torch.equal(t, part) for t in package.values() for part in parts)
            assert is_shipped == (kind == "adapter"), (i, projection)
        inside = f"{family(model.config).layers}.{i}.{family(model.config).attention}."
        matrices = {key.removeprefix(inside): t for key, t in package.items() if key.startswith(inside) and t.ndim == 2}
        for key, matrix in matrices.items():
            full = min(SHAPES[name][key.split(".")[0]][0])
            assert (int(torch.linalg.matrix_rank(matrix)) == full) == (kind == "adapter")
        assert bool(matrices) == (kind != "harmonizer")


@each_shape
def test_which_of_the_models_tensors_leave_as_they_are(tmp_path, tokenizer, name):
    """Those of adapter layers, and of compressed ones all but the projections; embeddings, last norm and head."""
    model, package = tiny_model(name), shipped(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    path = family(model.config).layers
    projections, split = (
        {
            f"{path}.{i}.{family(model.config).attention}.{projection}.{part}"
            for i in (2, 3)
            for projection, fused in family(model.config).projections.items()
            if part == "weight" or fused > 1
        }
        for part in ("weight", "bias")  # fused biases leave in three pieces
    )
    for key, tensor in model.state_dict().items():
        if key not in split:
            is_shipped = any(t.shape == tensor.shape and torch.equal(t, tensor) for t in package.values())
            assert is_shipped == (key not in projections and not key.startswith(f"{path}.0.")), key


@each_shape
def test_same_emulator_gives_the_same_bytes(tmp_path, tokenizer, name):
    model = tiny_model(name)
    plan = make_emulator(model)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        save(folder, model.config, tokenizer, plan, package_tensors(model, plan))
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


# --- what is refused -------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, tokenizer):
    return write_package(tmp_path / "package", tiny_model("llama"), tokenizer)


def refused(folder):
    return refusal(lambda: Package(folder).load(CPU))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shorten(file):
    file.write_bytes(file.read_bytes()[:-1])


def link(file):
    """The same content, but elsewhere."""
    file.symlink_to(file.rename(file.parent.parent / file.name))


@pytest.mark.parametrize(
    "damage", [flip, shorten, link, lambda file: file.unlink()], ids=["flip", "cut", "link", "gone"]
)
def test_damage_to_any_file_is_found_and_named(package, damage):
    names = set(read_json(package / "manifest.json")["files"])
    assert names >= {f"{part}.safetensors" for part in ("base", "adapter", "harmonizer", "compressed")}
    assert "tokenizer.json" in names
    for name in names:
        copy = package.parent / name / "copy"
        shutil.copytree(package, copy)
        damage(copy / name)
        assert name in refused(copy)
    Package(package).load(CPU)


@pytest.mark.parametrize("name", ["../secret", "sub/secret"])
def test_files_outside_the_package_are_refused_though_they_are_there(package, name):
    (package / "sub").mkdir()
    (package / name).write_text("x")
    list_again(package, name)
    assert "is no file of this format" in refused(package)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.secret", torch.ones(2)),
        ("model.norm.weight", None),
        ("model.norm.weight", torch.ones(33)),
        ("model.norm.weight", torch.ones(32, dtype=torch.float64)),
    ],
    ids=["extra", "missing", "shape", "dtype"],
)
def test_tensors_other_than_the_plans_are_refused_though_the_hash_is_right(package, name, tensor):
    tensors = {**read_tensors(package / "base.safetensors"), name: tensor}
    write_tensors(package / "base.safetensors", {key: t for key, t in tensors.items() if t is not None})
    list_again(package, "base.safetensors")
    assert repr(name) in refused(package)


LAYERS = [layer.model_dump(mode="json") for layer in PLAN]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": None}, "not a scaleot-emulator folder"),
        ({"format": "other"}, "not a scaleot-emulator folder"),
        ({"format_version": None}, "version None"),
        ({"format_version": 2}, "version 2"),
        *(
            ({key: None}, f"manifest.json: {key}: Field required")
            for key in ("architecture", "dtype", "layers", "files")
        ),
        ({"files": {}}, "'adapter.safetensors' is not listed"),
        ({"files": {"base.safetensors": {}}}, "manifest.json: files.base.safetensors.bytes: Field required"),
        ({"layers": 4}, "manifest.json: layers: Input should be a valid tuple"),
        ({"layers": [*LAYERS[:3], {"kind": "other"}]}, "manifest.json: layers.3.kind: Input should be 'adapter'"),
        ({"layers": LAYERS[1:2]}, "`layers` has 1 entries, the architecture 4"),
        ({"layers": [*LAYERS, LAYERS[1]]}, "`layers` has 5 entries, the architecture 4"),
        ({"layers": [LAYERS[0], LAYERS[1], LAYERS[1], LAYERS[3]]}, "adapter.safetensors: tensor"),
        ({"layers": [{**LAYERS[0], "harmonizer_rank": 9}, *LAYERS[1:]]}, "harmonizer.safetensors: tensor"),
        ({"layers": LAYERS}, "compressed.safetensors: tensor"),  # which aren't cut
        ({"dtype": "int7"}, "manifest.json: dtype: Input should be 'float32'"),
        ({"architecture": {"model_type": "llama", "hidden_size": 33}}, "manifest.json: it describes no model"),
        ({"architecture": {"model_type": "unheard-of"}}, "architecture 'unheard-of' is not supported"),
        ({"architecture": {"model_type": "bert"}}, "architecture 'bert' is not supported"),
    ],
    ids=str,
)
def test_manifest_that_states_something_else_or_makes_no_sense_is_refused(package, changes, reason):
    change_manifest(package, **changes)
    assert reason in refused(package)


def test_folder_without_a_sound_manifest_is_refused(package):
    (package / "manifest.json").write_text("{half")
    assert "manifest.json: not valid JSON" in refused(package)
    (package / "manifest.json").unlink()
    assert "manifest.json: no such file" in refused(package)


def test_context_that_bloom_was_trained_on_goes_into_its_package(tmp_path, tokenizer):
    folder = write_package(tmp_path / "bloom", tiny_model("bloom", seq_length=64), tokenizer)
    assert context_length(Package(folder).config) == 64
    architecture = read_json(folder / "manifest.json")["architecture"]
    for length in (-1, "64", True):
        change_manifest(folder, architecture={**architecture, "seq_length": length})
        assert "`seq_length` is" in refused(folder)
    change_manifest(folder, architecture={k: v for k, v in architecture.items() if k != "seq_length"})
    assert context_length(Package(folder).config) == 2048
