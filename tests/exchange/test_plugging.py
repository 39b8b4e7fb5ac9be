"""Plugging in changes what was tuned and nothing else, whatever dtypes the base's files have."""

import json
import os
import shutil
import subprocess
import sys
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


def arguments(folder: Path) -> tuple[object, ...]:
    return ("plug", folder / "real", folder / "adapter", "--package", folder / "package", "--out", folder / "out")


def plug(folder: Path) -> dict[str, torch.Tensor]:
    ended = scaleot(*arguments(folder))
    assert ended.code == 0, ended.said
    assert not any("tokenizer" in line for line in ended.said)
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


def other_files(folder: Path) -> dict[str, bytes]:
    """What lies in a folder besides weights, by path."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".safetensors"
    }


def describe_by_hand(real: Path) -> None:
    """Write a model's files as another library would, and what people put beside them."""
    config = json.loads((real / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config |= {"torch_dtype": config.pop("dtype"), "of_another_library": 1}
    (real / "config.json").write_text(json.dumps(config))
    (real / "generation_config.json").write_text('{"max_new_tokens": 7, "temperature": 0.6}')
    (real / "chat_template.jinja").write_text("{{ messages }}\n\n")
    (real / "additional_chat_templates").mkdir()
    (real / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    for name in ("LICENSE", "README.md", "NOTICE.txt"):
        (real / name).write_bytes(b"of its owner\r\n")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_every_file_beside_the_weights_is_the_bases_byte_for_byte(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, form: str
) -> None:
    write_parties(tmp_path, tokenizer, "llama", "float32", None)
    real = tmp_path / "real"
    describe_by_hand(real)
    before = other_files(real)
    if form == "bin":
        torch.save(load_file(real / "model.safetensors"), real / "pytorch_model.bin")
        (real / "model.safetensors").unlink()
    assert scaleot(*arguments(tmp_path)).code == 0
    assert other_files(tmp_path / "out") == before and len(before) >= 9
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)


def test_files_of_a_snapshot_of_the_hub_are_copied_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_parties(tmp_path, tokenizer, "llama", "float32", None)
    describe_by_hand(tmp_path / "real")
    hub = tmp_path / "hub" / "models--some--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tmp_path / "real", hub / "snapshots" / ("0" * 40))
    _, _, *others = arguments(tmp_path)
    code = "import sys; from scaleot_core.cli import main; sys.argv[0] = 'scaleot'; main()"
    offline = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, "plug", "some/model", *map(str, others)]
    ended = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert other_files(tmp_path / "out") == other_files(tmp_path / "real")


@pytest.mark.parametrize("changed", ["template", "token"])
def test_base_whose_tokenizer_is_not_the_one_that_was_tuned_with_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, changed: str
) -> None:
    write_parties(tmp_path, tokenizer, "llama", "float32", None)
    if changed == "template":
        (tmp_path / "real" / "chat_template.jinja").write_text("{{ 'another' }}")
    else:
        file = tmp_path / "real" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
    ended = scaleot(*arguments(tmp_path))
    told = "its chat templates would be others" if changed == "template" else "its pad_token would be None"
    assert ended.code == 0
    assert any("its tokenizer isn't the package's" in line and told in line for line in ended.said), ended.said
