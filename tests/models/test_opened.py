"""The real model is read from its own files, whatever they are called, tensor by tensor in its own dtypes."""

from pathlib import Path

import pytest
import torch
from damages import DAMAGES
from helpers import each_family, refusal, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from scaleot_core.models.opened import open_model


def write(folder: Path, tokenizer: PreTrainedTokenizerFast, name: str = "llama", **how: str) -> dict[str, torch.Tensor]:
    """A model on disk; its tensors by name, those that are tied once."""
    model = tiny_model(name)
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


@pytest.mark.parametrize("largest", ["1GB", "20KB"])
def test_every_tensor_is_read_in_its_own_dtype_from_one_file_or_several(tmp_path, tokenizer, largest):
    model = tiny_model("llama").bfloat16()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.bfloat16)
        parameter.data += torch.tensor(2.0**-20).to(parameter.dtype)  # which bfloat16 has no digit for beside 1
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path, max_shard_size=largest)
    assert (tmp_path / "model.safetensors.index.json").exists() == (largest == "20KB")
    tokenizer.save_pretrained(tmp_path)
    with open_model(str(tmp_path), tmp_path) as source:
        found = source.streamed()
        assert found.dtype == torch.bfloat16 and (len(source.files) == 1) == (largest == "1GB")
        tensors = {name: found.read_stored(name) for name in expected}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@each_family
def test_tensors_may_lack_the_base_models_prefix_as_on_the_hub(tmp_path, tokenizer, name):
    expected = write(tmp_path, tokenizer, name)
    file, prefix = tmp_path / "model.safetensors", f"{tiny_model(name).base_model_prefix}."
    save_file({key.removeprefix(prefix): t for key, t in load_file(file).items()}, file, {"format": "pt"})
    with open_model(str(tmp_path), tmp_path) as source:
        assert (source.files == [file]) == (name != "gpt_neox")  # no copy but of that, whose head has another name
        found = source.streamed()
        assert all(torch.equal(found.read_stored(key), tensor) for key, tensor in expected.items())


def test_model_of_another_format_is_written_anew_for_a_while(tmp_path, tokenizer):
    expected = write(tmp_path / "model", tokenizer)
    file = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(file), tmp_path / "model" / "pytorch_model.bin")
    file.unlink()
    (tmp_path / "scratch").mkdir()
    with open_model(str(tmp_path / "model"), tmp_path / "scratch") as source:
        assert source.files[0].is_relative_to(tmp_path / "scratch")
        found = source.streamed()
        assert all(torch.equal(found.read_stored(key), tensor) for key, tensor in expected.items())
    assert not list((tmp_path / "scratch").iterdir())


def other_shape(folder: Path) -> None:
    """A tensor of another shape than the configuration gives it."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(7)}, file, {"format": "pt"})


@pytest.mark.parametrize("damage", [*DAMAGES, other_shape])
def test_damaged_model_is_one_line(tmp_path, tokenizer, damage):
    write(tmp_path / "model", tokenizer)
    damage(tmp_path / "model")

    def use() -> None:
        with open_model(str(tmp_path / "model"), tmp_path):
            pytest.fail("it was opened")

    assert refusal(use).startswith(f"model = {str(tmp_path / 'model')!r}: ")
    assert [file.name for file in tmp_path.iterdir()] in ([], ["model"])
