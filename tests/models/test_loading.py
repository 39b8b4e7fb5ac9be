"""Models in folders: what is refused, what a loaded one is like, and losses against naive ones."""

import json
import sys

import pytest
import torch
from damages import DAMAGES, WEIGHTS
from helpers import CPU, refusal, tiny_model

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json
from scaleot_core.common.tensors import read_tensors
from scaleot_core.models import loading
from scaleot_core.models.families import FAMILIES, decoder_layers
from scaleot_core.models.forward import mean_loss, next_token_loss, swapped_layers
from scaleot_core.models.loading import load_model, load_tokenizer, read_model, save_model


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_architecture(folder):
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def load(folder, dtype=torch.float32):
    return load_model(folder, device=CPU, dtype=dtype)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_not_loaded(folder, damage):
    damage(folder)
    assert str(folder) in refusal(load, folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_not_copied(tmp_path, folder, damage):
    damage(folder)
    assert f"model = {str(folder)!r}" in refusal(save_model, str(folder), tmp_path / "copy", torch.float32)
    assert not (tmp_path / "copy").exists()


def test_unsupported_architecture_names_the_supported_ones(tmp_path, folder):
    change_architecture(folder)
    for said in (refusal(load, folder), refusal(save_model, str(folder), tmp_path / "copy", torch.float32)):
        assert "'bert' is not supported" in said and all(name in said for name in FAMILIES)


def test_loaded_model_is_the_saved_one_frozen_and_in_evaluation_mode(folder):
    model, saved = load(folder), tiny_model("llama").state_dict()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_copy_is_in_the_dtype_asked_for(tmp_path, folder, tokenizer):
    save_model(str(folder), tmp_path / "copy", torch.bfloat16)
    original, copy = (read_tensors(f / WEIGHTS) for f in (folder, tmp_path / "copy"))
    assert copy.keys() == original.keys()
    assert all(torch.equal(tensor, original[name].bfloat16()) for name, tensor in copy.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in copy.values())
    assert load(tmp_path / "copy", torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "copy").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["shards", "bin"])
def test_every_form_of_the_hub_gives_the_same_copy(tmp_path, tokenizer, form, dtype):
    model = tiny_model("llama").to(dtype)
    tokenizer.save_pretrained(tmp_path / "m")
    if form == "shards":
        model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
        assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    else:
        model.config.save_pretrained(tmp_path / "m")
        torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    save_model(str(tmp_path / "m"), tmp_path / "copy", torch.float32)
    copy = load(tmp_path / "copy").state_dict()
    assert all(torch.equal(tensor.float(), copy[name]) for name, tensor in model.state_dict().items())


class Payload:
    """What a pickled checkpoint might do."""

    def __reduce__(self):
        return (pytest.fail, ("code of the checkpoint ran",))


def test_bin_checkpoint_with_code_is_refused(tmp_path, tokenizer):
    tiny_model("llama").config.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    torch.save({"model.norm.weight": Payload()}, tmp_path / "m" / "pytorch_model.bin")
    assert "it can't be loaded" in refusal(save_model, str(tmp_path / "m"), tmp_path / "copy", torch.float32)


def test_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    tiny_model("llama", vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    said = refusal(save_model, str(tmp_path / "m"), tmp_path / "copy", torch.float32)
    assert f"its tokenizer has {len(tokenizer)} tokens and the model's embedding {len(tokenizer) - 1}" in said


def test_place_where_no_model_is_is_told_as_what_it_is(tmp_path, folder, monkeypatch):
    """Not as a repository's id that has a wrong form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it asks again for twenty seconds
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.gguf").write_text("x")
    for name, said in (
        (str(tmp_path / "nowhere"), "no such folder; correct the path"),
        ("./nowhere", "no such folder; correct the path"),
        ("models/llama/7b", "no such folder; correct the path"),
        ("nowhere", "no such folder is here, and from the hub it can't be loaded ("),
        ("empty", "no config.json is in that folder"),
        ("weights.gguf", "that is a file; name the folder"),
    ):
        assert refusal(read_model, name).startswith(f"model = {name!r}: {said}")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read_model(f"~/{folder.name}")[0].num_parameters()


def test_tokenizer_in_sentencepieces_format_alone_says_what_to_install(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert "pip install sentencepiece" in refusal(read_model, str(folder))


def test_tokenizer_that_no_copy_keeps_is_refused(tmp_path, folder, monkeypatch):
    load = loading.load_tokenizer

    def other(place):
        tokenizer = load(place)
        tokenizer.add_tokens(["<more>"])
        return tokenizer

    monkeypatch.setattr(loading, "load_tokenizer", other)
    said = refusal(save_model, str(folder), tmp_path / "copy", torch.float32)
    assert said.startswith(f"model = {str(folder)!r}: its tokenizer can't be copied: it would have 258 tokens, not 257")


def test_folder_without_tokenizer(tmp_path, folder):
    assert str(tmp_path / "none") in refusal(load_tokenizer, tmp_path / "none")
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    assert str(tmp_path / "bare") in refusal(load_tokenizer, tmp_path / "bare")


def test_replaced_layers_come_back_even_after_an_exception(model):
    originals, stand_in = list(decoder_layers(model)), torch.nn.Identity()
    with pytest.raises(ZeroDivisionError), swapped_layers(model, {0: stand_in, 2: stand_in}):
        layers = list(decoder_layers(model))
        assert [layer is stand_in for layer in layers] == [True, False, True, False]
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(decoder_layers(model), originals, strict=True))


def naive_loss(model, block) -> float:
    """Mean over positions of −log p(next token), one block (T,) at a time."""
    ids = block.long()
    logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return -torch.stack([logp[t, ids[t + 1]] for t in range(len(ids) - 1)]).mean().item()


def test_block_loss_is_the_mean_cross_entropy_and_uses_no_cache(model, blocks):
    assert model(blocks[:1].long()).past_key_values is not None  # the model's default
    caches = []
    hook = model.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    loss = next_token_loss(model, blocks[:3]).item()
    hook.remove()
    assert caches == [None]
    assert loss == pytest.approx(sum(naive_loss(model, block) for block in blocks[:3]) / 3, rel=1e-5)


def test_mean_loss_is_the_mean_over_blocks_whatever_the_batch(model, blocks):
    expected = sum(naive_loss(model, block) for block in blocks) / len(blocks)
    for size in (1, 5, 12, 100):  # 5 leaves a last batch of 2
        assert mean_loss(model, blocks, batch_blocks=size) == pytest.approx(expected, rel=1e-5)


def test_code_in_a_folder_is_neither_run_nor_asked_for(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked to run code of the folder"))
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError):
        load_model(tmp_path / "m", device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UserError):
        save_model(str(tmp_path / "m"), tmp_path / "copy", torch.float32)


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files_without_their_index_name_what_is_missing(folder, single):
    (folder / WEIGHTS).rename(folder / single.replace(".", "-00001-of-00001."))
    assert refusal(read_model, str(folder)).startswith(f"model = {str(folder)!r}: {single}.index.json is missing")
