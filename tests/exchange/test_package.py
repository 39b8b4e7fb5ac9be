"""A package that is whole, sufficient, and refused when it isn't."""

import shutil
import socket

import pytest
import torch
from helpers import (
    CPU,
    IDS,
    PLAN,
    SHAPES,
    WHOLE,
    change_manifest,
    each_family,
    each_head,
    form,
    list_again,
    make_emulator,
    refusal,
    snapshot,
    tiny_model,
    write_package,
)

from scaleot_core.common.files import read_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange.package import Package, save
from scaleot_core.models.families import attention, decoder_layers, family
from scaleot_core.models.loading import load_model, load_tokenizer


def shipped(folder):
    """Every tensor of a package."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_tensors(file).items()}


@each_family
@each_head
def test_package_gives_the_same_emulator_back(tmp_path, tokenizer, name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    package = write_package(tmp_path / "package", model, tokenizer)
    given = Package(package)
    loaded, plan = given.load(CPU), given.plan
    assert plan == PLAN
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor) and loaded.state_dict()[key].dtype == tensor.dtype
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert ("lm_head.weight" in shipped(package)) == (not tied)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@each_family
def test_package_keeps_bfloat16(tmp_path, tokenizer, name):
    tiny_model(name).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", device=CPU, dtype=torch.bfloat16)
    loaded = Package(write_package(tmp_path / "package", model, tokenizer)).load(CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@each_family
def test_data_owner_needs_nothing_but_the_package(tmp_path, tokenizer, monkeypatch, name):
    """No other file of the project is there, and no network."""
    tiny_model(name).save_pretrained(tmp_path / "owner" / "model")
    model = load_model(tmp_path / "owner" / "model", device=CPU, dtype=torch.float32)
    write_package(tmp_path / "owner" / "package", model, tokenizer)
    shutil.move(tmp_path / "owner" / "package", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "owner")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", lambda *args, **options: pytest.fail("a connection was tried"))
    loaded = Package(tmp_path / "elsewhere").load(CPU)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert load_tokenizer(tmp_path / "elsewhere")("some text")["input_ids"] == tokenizer("some text")["input_ids"]


@pytest.mark.parametrize("beta", [0.8, 0.1])  # as two factors, and as one dense matrix
@each_family
def test_no_attention_matrix_leaves_at_full_rank_but_those_of_adapters(tmp_path, tokenizer, name, beta):
    model = tiny_model(name)
    package = shipped(write_package(tmp_path / "package", tiny_model(name), tokenizer, Plan(PLAN.kinds, beta, form(8))))
    for i, kind in enumerate(PLAN.kinds):
        block = attention(model.config, decoder_layers(model)[i])
        for projection, shapes in SHAPES[name].items():
            weight = block.get_submodule(projection).weight
            whole = weight.T if family(model.config).transposed else weight
            parts = [weight, weight.T, *whole.split([shape[0] for shape in shapes])]
            there = any(torch.equal(t, part) for t in package.values() for part in parts)
            assert there == (kind == "adapter"), (i, projection)
        inside = f"{family(model.config).layers}.{i}.{family(model.config).attention}."
        matrices = {key.removeprefix(inside): t for key, t in package.items() if key.startswith(inside) and t.ndim == 2}
        full = {key: min(SHAPES[name][key.split(".")[0]][0]) for key in matrices}
        ranks = {key: int(torch.linalg.matrix_rank(matrix)) for key, matrix in matrices.items()}
        assert all((rank == full[key]) == (kind == "adapter") for key, rank in ranks.items())
        assert bool(ranks) == (kind != "harmonizer")


@each_family
def test_which_of_the_models_tensors_leave_as_they_are(tmp_path, tokenizer, name):
    """Those of adapter layers, and of compressed ones all but the projections; embeddings, last norm and head."""
    model, package = tiny_model(name), shipped(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    path = family(model.config).layers
    projections, split = (
        {
            f"{path}.{i}.{family(model.config).attention}.{projection}.{part}"
            for i in PLAN.layers("compressed")
            for projection, fused in family(model.config).projections.items()
            if part == "weight" or fused > 1
        }
        for part in ("weight", "bias")  # fused biases leave in three pieces
    )
    gone = tuple(f"{path}.{i}." for i in PLAN.layers("harmonizer"))
    for key, tensor in model.state_dict().items():
        if key in split:
            continue
        there = any(t.shape == tensor.shape and torch.equal(t, tensor) for t in package.values())
        assert there == (key not in projections and not key.startswith(gone)), key


def test_same_emulator_gives_the_same_bytes(tmp_path, tokenizer, model):
    make_emulator(model)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        save(folder, model.config, tokenizer, PLAN, package_tensors(model, PLAN))
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
    file.rename(file.parent.parent / file.name)
    file.symlink_to(file.parent.parent / file.name)


@pytest.mark.parametrize(
    "damage", [flip, shorten, link, lambda file: file.unlink()], ids=["flip", "cut", "link", "gone"]
)
def test_damage_to_any_file_is_found_and_named(package, damage):
    names = set(read_json(package / "manifest.json")["files"])
    parts = {f"{part}.safetensors" for part in ("base", "adapter", "harmonizer", "compressed")}
    assert names >= parts | {"tokenizer.json"}
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "version 2"),
        ({"format": "other"}, "not a scaleot-emulator folder"),
        ({"layers": ["harmonizer", "adapter", "adapter", "compressed"]}, "tensor"),
        ({"harmonizer": form(9).model_dump()}, "tensor"),
        ({"beta": 0.5}, "tensor"),
        ({"files": {}}, "tensor"),
    ],
)
def test_manifest_that_states_something_else_is_refused(package, changes, said):
    change_manifest(package, **changes)
    assert said in refused(package)


KEYS = ["format", "format_version", "architecture", "dtype", "layers", "beta", "harmonizer"]


@pytest.mark.parametrize(
    "changes",
    [
        *({key: None} for key in [*KEYS, "files"]),
        {"layers": ["adapter"] * 5},
        {"layers": 4},
        {"dtype": "int7"},
        {"beta": "much"},
        {"architecture": {"model_type": "llama", "hidden_size": 33}},
        {"architecture": {"model_type": "unheard-of"}},
        {"architecture": {"model_type": "bert"}},
        {"files": {"base.safetensors": {}}},
    ],
    ids=str,
)
def test_manifest_that_makes_no_sense_is_refused_in_one_line(package, changes):
    change_manifest(package, **changes)
    assert refused(package)


@pytest.mark.parametrize(
    ("plan", "layers"), [(PLAN, ["harmonizer", "other", "compressed", "compressed"]), (WHOLE, ["adapter"])]
)
def test_plan_that_does_not_name_a_known_kind_for_each_layer_is_refused(tmp_path, tokenizer, plan, layers):
    package = write_package(tmp_path / "package", tiny_model("llama"), tokenizer, plan)
    change_manifest(package, layers=layers)
    assert "layers" in refused(package)


def test_folder_without_a_sound_manifest(package):
    (package / "manifest.json").write_text("{half")
    assert "manifest.json" in refused(package)
    (package / "manifest.json").unlink()
    assert "manifest.json" in refused(package)
