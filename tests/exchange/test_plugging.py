"""Plugging in changes what was tuned and nothing else, whatever dtypes the base's files have."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CPU, LORA, list_again, scaleot, tiny_model, write_adapter, write_package
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from scaleot_core.exchange.package import Package
from scaleot_core.settings import LoraForm

DTYPES: dict[str, Callable[[str], torch.dtype]] = {  # of a tensor of the real model, by its name
    "float32": lambda name: torch.float32,
    "float16": lambda name: torch.float16,
    "bfloat16": lambda name: torch.bfloat16,
    "norms in float32": lambda name: torch.float32 if "norm" in name or ".ln_" in name else torch.bfloat16,
    "embedding in float32": lambda name: torch.float32 if "embed" in name else torch.bfloat16,
    "head in float32": lambda name: torch.float32 if "lm_head" in name else torch.float16,
}


def write_parties(
    folder: Path, tokenizer: PreTrainedTokenizerFast, family: str, dtypes: str, lora: LoraForm | None
) -> dict[str, torch.Tensor]:
    """Write a real model of these dtypes, its package in bfloat16 and an adapter; return the model's tensors."""
    real, dtype = folder / "real", DTYPES[dtypes]
    tiny_model(family).save_pretrained(real)
    tokenizer.save_pretrained(real)
    tensors = {name: tensor.to(dtype(name)) for name, tensor in load_file(real / "model.safetensors").items()}
    save_file(tensors, real / "model.safetensors", {"format": "pt"})
    config = json.loads((real / "config.json").read_text())
    (real / "config.json").write_text(json.dumps(config | {"dtype": str(dtype("weight")).removeprefix("torch.")}))
    shipped = AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16).eval().requires_grad_(False)
    package = Package(write_package(folder / "package", shipped, tokenizer))
    write_adapter(folder / "adapter", package.load(CPU), lora, package)
    return tensors


def plug(folder: Path) -> dict[str, torch.Tensor]:
    ended = scaleot(
        "plug", folder / "real", folder / "adapter", "--package", folder / "package", "--out", folder / "out"
    )
    assert ended.code == 0, ended.said
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["layers", "lora"])
@pytest.mark.parametrize(
    ("family", "dtypes"), [*(("llama", base) for base in DTYPES), ("gpt2", "norms in float32"), ("opt", "float16")]
)
def test_what_was_not_tuned_keeps_its_dtype_and_its_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, dtypes: str, lora: LoraForm | None
) -> None:
    before = write_parties(tmp_path, tokenizer, family, dtypes, lora)
    after = plug(tmp_path)
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    untuned = ("norm", "ln_", "embed")
    assert changed and all(not any(map(name.__contains__, untuned)) if lora else ".1." in name for name in changed)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("real", "out")]
    assert configs[0]["dtype"] == configs[1]["dtype"]


def test_number_that_tuning_left_alone_is_the_bases_to_the_last_digit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Though the package, in bfloat16, had fewer digits of it."""
    before = write_parties(tmp_path, tokenizer, "llama", "float32", None)
    file, name = tmp_path / "adapter" / "adapter.safetensors", "model.layers.1.mlp.up_proj.weight"
    tuned, shipped = load_file(file), load_file(tmp_path / "package" / "adapter.safetensors")
    tuned[name][3:] = shipped[name][3:]
    save_file(tuned, file)
    list_again(file.parent, file.name)
    after = plug(tmp_path)
    assert torch.equal(after[name][3:], before[name][3:])
    change = tuned[name][:3].float() - shipped[name][:3].float()
    torch.testing.assert_close(after[name][:3] - before[name][:3], change, rtol=0, atol=1e-6)
    assert change.any()
