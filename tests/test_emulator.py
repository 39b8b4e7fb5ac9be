"""The emulator: what becomes of each layer, and a package that is whole, sufficient and refused when it isn't."""

import json
import shutil
import socket

import pytest
import torch
from conftest import CONFIGS, form, tiny_model
from test_dlr import weights_hash
from test_families import SHAPES
from test_files import refusal, snapshot

from scaleot_core.common.files import read_json, sha256
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.emulator import apply_plan, layer_parameters, package_tensors, plug_in
from scaleot_core.compression.layer_importance import new_harmonizers
from scaleot_core.compression.plan import Plan, choose_layers
from scaleot_core.compression.svd import svd_factors
from scaleot_core.exchange.package import Package, save
from scaleot_core.models.families import attention, decoder_layers, family
from scaleot_core.models.forward import swapped_layers
from scaleot_core.models.loading import load_model, load_tokenizer

CPU = torch.device("cpu")
PLAN = Plan(("harmonizer", "adapter", "compressed", "compressed"), beta=0.8, harmonizer=form(8))
WHOLE = Plan(("adapter", "compressed", "compressed", "compressed"), beta=0.0, harmonizer=form(8))
IDS = torch.tensor([[5, 80, 200, 41, 17, 222, 9, 133]])
each_family = pytest.mark.parametrize("name", sorted(CONFIGS))
each_head = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def trained_harmonizers(model):
    """Harmonizers with something in them, as if they were trained."""
    harmonizers = new_harmonizers(model, form(8), seed=0)
    for parameter in harmonizers.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return harmonizers


def give_harmonizers(model, plan, harmonizers):
    """Make a model the emulator with these harmonizers."""
    apply_plan(model, plan, svd_factors)
    for i in plan.layers("harmonizer"):
        decoder_layers(model)[i].load_state_dict(harmonizers[i].state_dict())


def turned(model, plan=PLAN):
    """Make a model the emulator."""
    give_harmonizers(model, plan, trained_harmonizers(model))


def emulator_of(name, plan=PLAN, **changes):
    model = tiny_model(name, **changes)
    turned(model, plan)
    return model


def write(folder, model, tokenizer, plan=PLAN):
    """Turn a model into the emulator and write its package."""
    folder.mkdir()
    turned(model, plan)
    save(folder, model.config, tokenizer, plan, package_tensors(model, plan))
    return folder


def shipped(folder):
    """Every tensor of a package."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_tensors(file).items()}


# --- which layer becomes what ----------------------------------------------------------------------------


def chosen(scores, adapter_layers=1, alpha=0.25, placement="importance"):
    return choose_layers(scores, adapter_layers=adapter_layers, alpha=alpha, placement=placement)


@pytest.mark.parametrize("layers", [5, 12, 24, 30, 48, 54])
def test_count_of_harmonizers_is_rounded_half_up(layers):
    for percent in range(101):
        kinds = chosen([0.0] * layers, adapter_layers=4, alpha=percent / 100)
        assert kinds.count("adapter") == 4
        assert kinds.count("harmonizer") == (2 * percent * (layers - 4) + 100) // 200, percent


def test_highest_scores_are_adapters_and_lowest_are_replaced():
    scores = [0.1, -3.0, 2.0, 0.3, 5.0, -1.0, 0.2]
    assert chosen(scores, adapter_layers=2, alpha=0.4) == (
        "compressed",
        "harmonizer",
        "adapter",
        "compressed",
        "adapter",
        "harmonizer",
        "compressed",
    )


@pytest.mark.parametrize(("count", "adapters"), [(1, [0]), (2, [0, 7]), (3, [0, 1, 7]), (4, [0, 1, 6, 7])])
def test_ends_are_adapters_whatever_the_scores(count, adapters):
    scores = [-9.0, -8.0, 1.0, 2.0, 3.0, 4.0, -7.0, -6.0]
    kinds = chosen(scores, adapter_layers=count, alpha=1.0, placement="ends")
    assert [i for i, kind in enumerate(kinds) if kind == "adapter"] == adapters
    fewer = chosen(scores, adapter_layers=4, alpha=0.5, placement="ends")
    assert fewer[2:6] == ("harmonizer", "harmonizer", "compressed", "compressed")


def test_alpha_takes_nothing_at_zero_and_everything_at_one():
    assert set(chosen([3.0, 1.0, 2.0, 0.0], alpha=0.0)[1:]) == {"compressed"}
    assert set(chosen([3.0, 1.0, 2.0, 0.0], alpha=1.0)[1:]) == {"harmonizer"}


@pytest.mark.parametrize("count", [4, 5])
def test_some_layer_must_be_left_beside_the_adapters(count):
    assert f"adapter_layers = {count}" in refusal(chosen, [1.0, 2.0, 3.0, 4.0], count)
    assert chosen([1.0, 2.0, 3.0, 4.0], 3).count("adapter") == 3


# --- what it computes ------------------------------------------------------------------------------------


@each_family
@each_head
def test_alpha_and_beta_at_zero_give_the_model_itself(name, tied):
    whole = tiny_model(name, tie_word_embeddings=tied)(IDS).logits
    assert torch.equal(emulator_of(name, WHOLE, tie_word_embeddings=tied)(IDS).logits, whole)
    assert not torch.allclose(emulator_of(name, tie_word_embeddings=tied)(IDS).logits, whole)


@each_family
def test_harmonizers_that_were_given_stand_in_for_their_own_layers(name):
    real, model = tiny_model(name), tiny_model(name)
    harmonizers = trained_harmonizers(model)
    plan = Plan(("harmonizer", "adapter", "compressed", "harmonizer"), 0.0, form(8))
    give_harmonizers(model, plan, harmonizers)
    with swapped_layers(real, {i: harmonizers[i] for i in (0, 3)}):
        assert torch.equal(model(IDS).logits, real(IDS).logits)


@pytest.mark.parametrize("kinds", [PLAN.kinds, ("compressed", "harmonizer", "adapter", "harmonizer")])
@each_family
def test_generation_with_a_cache_equals_generation_without(tmp_path, tokenizer, name, kinds):
    plan = Plan(kinds, 0.8, form(8))
    model = Package(write(tmp_path / "package", tiny_model(name), tokenizer, plan)).load(CPU)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached, uncached = (model.generate(IDS, **options, use_cache=use) for use in (True, False))
    assert cached.shape == (1, 20) and torch.equal(cached, uncached)
    begun = model(IDS[:, :3], use_cache=True)
    rest = model(IDS[:, 3:], past_key_values=begun.past_key_values).logits  # many tokens at once, after some
    torch.testing.assert_close(rest, model(IDS, use_cache=False).logits[:, 3:])


# --- the package -----------------------------------------------------------------------------------------


@each_family
@each_head
def test_package_gives_the_same_emulator_back(tmp_path, tokenizer, name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    package = write(tmp_path / "package", model, tokenizer)
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
    loaded = Package(write(tmp_path / "package", model, tokenizer)).load(CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@each_family
def test_data_owner_needs_nothing_but_the_package(tmp_path, tokenizer, monkeypatch, name):
    """No other file of the project is there, and no network."""
    tiny_model(name).save_pretrained(tmp_path / "owner" / "model")
    model = load_model(tmp_path / "owner" / "model", device=CPU, dtype=torch.float32)
    write(tmp_path / "owner" / "package", model, tokenizer)
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
    package = shipped(write(tmp_path / "package", tiny_model(name), tokenizer, Plan(PLAN.kinds, beta, form(8))))
    for i, kind in enumerate(PLAN.kinds):
        block = attention(model.config, decoder_layers(model)[i])
        for projection, fused in family(model.config).projections.items():
            weight = block.get_submodule(projection).weight
            parts = [weight, weight.T, *weight.chunk(fused), *weight.T.chunk(fused)]
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
    model, package = tiny_model(name), shipped(write(tmp_path / "package", tiny_model(name), tokenizer))
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
    turned(model)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        save(folder, model.config, tokenizer, PLAN, package_tensors(model, PLAN))
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


# --- what is refused -------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, tokenizer):
    return write(tmp_path / "package", tiny_model("llama"), tokenizer)


def refused(folder):
    return refusal(lambda: Package(folder).load(CPU))


def change_manifest(folder, **changes):
    """Overwrite keys of the manifest; None takes one out."""
    manifest = {**read_json(folder / "manifest.json"), **changes}
    text = json.dumps({key: value for key, value in manifest.items() if value is not None or key not in changes})
    (folder / "manifest.json").write_text(text)


def list_again(folder, *names):
    """Make the manifest state what files hold now, as one who changes a package on purpose would."""
    files = read_json(folder / "manifest.json")["files"]
    entry = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    change_manifest(folder, files={**files, **entry})


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
    package = write(tmp_path / "package", tiny_model("llama"), tokenizer, plan)
    change_manifest(package, layers=layers)
    assert "layers" in refused(package)


def test_folder_without_a_sound_manifest(package):
    (package / "manifest.json").write_text("{half")
    assert "manifest.json" in refused(package)
    (package / "manifest.json").unlink()
    assert "manifest.json" in refused(package)


# --- adapter layers --------------------------------------------------------------------------------------


def test_parameters_of_a_kind_are_those_of_its_layers_and_no_others(model):
    turned(model)
    found = layer_parameters(model, PLAN, "adapter")
    assert {id(p) for p in found.values()} == {id(p) for p in decoder_layers(model)[1].parameters()}
    assert all(model.get_parameter(name) is p for name, p in found.items())


@each_family
def test_plug_in_puts_the_adapters_into_the_real_model_and_touches_nothing_else(name):
    emulator, real = emulator_of(name), tiny_model(name)
    tuned = {key: p + 1 for key, p in layer_parameters(emulator, PLAN, "adapter").items()}
    before = {key: p.clone() for key, p in real.named_parameters()}
    plug_in(real, PLAN, tuned)
    for key, parameter in real.named_parameters():
        assert torch.equal(parameter, tuned.get(key, before[key]))
    assert all(not torch.equal(before[key], tensor) for key, tensor in tuned.items())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(64, 32)),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(64, 32)),
        ("model.norm.weight", torch.ones(32)),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(63, 32)),
        ("model.layers.1.mlp.up_proj.weight", None),
    ],
    ids=["name", "another layer", "outside the layers", "shape", "missing"],
)
def test_adapters_that_do_not_fit_are_refused_and_none_is_put_in(name, tensor):
    real = tiny_model("llama")
    before = weights_hash(real)
    tuned = {key: p + 1 for key, p in layer_parameters(emulator_of("llama"), PLAN, "adapter").items()}
    given = {key: value for key, value in {**tuned, name: tensor}.items() if value is not None}
    assert repr(name) in refusal(plug_in, real, PLAN, given)
    assert weights_hash(real) == before
