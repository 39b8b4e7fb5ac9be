"""Plugging in changes what was tuned and nothing else, whatever dtypes the base's files have."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import LORA, list_again, scaleot, tiny_model, write_adapter, write_package
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from scaleot_core.exchange.package import Package

Dtypes = Callable[[str], torch.dtype]
BASES: dict[str, Dtypes] = {
    "float32": lambda name: torch.float32,
    "float16": lambda name: torch.float16,
    "bfloat16": lambda name: torch.bfloat16,
    "norms in float32": lambda name: torch.float32 if "norm" in name or ".ln_" in name else torch.bfloat16,
    "embedding in float32": lambda name: torch.float32 if "embed" in name else torch.bfloat16,
    "head in float32": lambda name: torch.float32 if "lm_head" in name else torch.float16,
}


def write_base(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str, dtype: Dtypes) -> Path:
    """A base of one family whose file has each tensor in a dtype of its own."""
    model = tiny_model(family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype(name)) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype("weight")).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "lora"])
@pytest.mark.parametrize(
    ("family", "base"), [*(("llama", base) for base in BASES), ("gpt2", "norms in float32"), ("opt", "float16")]
)
def test_what_was_not_tuned_keeps_its_dtype_and_its_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, base: str, kind: str
) -> None:
    real = write_base(tmp_path / "base", tokenizer, family, BASES[base])
    shipped = AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16).eval().requires_grad_(False)
    package = write_package(tmp_path / "package", shipped, tokenizer)
    opened = Package(package)
    adapter = write_adapter(
        tmp_path / "adapter", opened.load(torch.device("cpu")), LORA if kind == "lora" else None, opened
    )
    ended = scaleot("plug", real, adapter, "--package", package, "--out", tmp_path / "out")
    assert ended.code == 0, ended.said
    before, after = load_file(real / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    if kind == "layers":
        assert not [name for name in changed if ".1." not in name]
    else:
        assert not [name for name in changed if "norm" in name or "ln_" in name or "embed" in name]
    dtypes = [json.loads((folder / "config.json").read_text())["dtype"] for folder in (real, tmp_path / "out")]
    assert dtypes[0] == dtypes[1]


def test_number_that_tuning_left_alone_is_the_bases_to_the_last_digit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Though the package, in bfloat16, had fewer digits of it."""
    real = write_base(tmp_path / "base", tokenizer, "llama", BASES["float32"])
    shipped = AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16).eval().requires_grad_(False)
    package = write_package(tmp_path / "package", shipped, tokenizer)
    opened = Package(package)
    model = opened.load(torch.device("cpu"))
    adapter = write_adapter(tmp_path / "adapter", model, None, opened)
    file = adapter / "adapter.safetensors"
    tensors, original = load_file(file), load_file(package / "adapter.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3:] = original[name][3:]
    save_file(tensors, file)
    list_again(adapter, "adapter.safetensors")
    assert scaleot("plug", real, adapter, "--package", package, "--out", tmp_path / "out").code == 0
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (real, tmp_path / "out"))
    assert torch.equal(after[3:], before[3:]) and not torch.equal(after[:3], before[:3])
    moved = (tensors[name][:3].float() - original[name][:3].float()) - (after[:3] - before[:3])
    assert moved.abs().max() < 1e-6
