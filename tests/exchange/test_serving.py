"""Served by transformers or vLLM, a plug-in's folder, or its PEFT adapter on the real model, answers as in Python."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, LORA, scaleot, tiny_model, write_adapter, write_package
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scaleot_core.exchange.package import Package

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a server imports for half a minute and more
PROMPT, TOKENS = "w5 w17 w3", 8
VLLM = shutil.which("vllm")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, what its owner made of it with a returned adapter, and that adapter as PEFT has it."""
    folder = tmp_path_factory.mktemp("served")
    vocabulary = {"<eos>": 0, **{f"w{i}": i for i in range(1, 250)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    wide = {"hidden_size": 128, "head_dim": 32, "vocab_size": 250, "bos_token_id": None, "eos_token_id": 0}
    model = tiny_model("llama", **wide)
    model.save_pretrained(folder / "real")
    tokenizer.save_pretrained(folder / "real")
    package = Package(write_package(folder / "package", model, tokenizer))
    write_adapter(folder / "adapter", package.load(CPU), LORA, package, change=0.05)
    options = ("--package", folder / "package", "--out", folder / "plugged", "--as-lora", folder / "lora")
    assert scaleot("plug", folder / "real", folder / "adapter", *options).code == 0
    return folder


def says(folder: Path) -> str:
    """What a folder's model goes on with in transformers, the likeliest token each time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))


def ask(port: int, path: str, **request: Any) -> Any:
    """Ask a server: GET without a request, else POST."""
    body = json.dumps(request).encode() if request else None
    url = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(url, timeout=300) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@contextmanager
def server(*command: object) -> Iterator[int]:
    """Run a server until the block ends; give its port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    arguments = [*map(str, command), "--port", str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=small, start_new_session=True)
    try:
        while True:
            assert process.poll() is None, "the server ended before it answered"
            try:
                ask(port, "/health")
                break
            except (OSError, ValueError):  # not there yet, or not whole
                time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def completion(port: int, model: str) -> str:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    return str(ask(port, "/v1/completions", **asked)["choices"][0]["text"]).strip()


def test_the_two_models_differ(served: Path) -> None:
    assert says(served / "real") != says(served / "plugged") != ""


@pytest.mark.skipif(not find_spec("fastapi") or not find_spec("uvicorn"), reason="transformers[serving] isn't here")
def test_transformers_serves_the_folder(served: Path) -> None:
    transformers = Path(sys.executable).with_name("transformers")
    with server(transformers, "serve", served / "plugged", "--device", "cpu", "--dtype", "float32") as port:
        assert completion(port, str(served / "plugged")) == says(served / "plugged")


@pytest.mark.skipif(not VLLM, reason="vllm isn't here")
def test_vllm_serves_the_folder(served: Path) -> None:
    options = ("--dtype", "float32", "--served-model-name", "tuned")
    with server(VLLM, "serve", served / "plugged", *options) as port:
        assert completion(port, "tuned") == says(served / "plugged")


@pytest.mark.skipif(not VLLM, reason="vllm isn't here")
def test_vllm_serves_the_adapter_beside_the_real_model(served: Path) -> None:
    options = ("--dtype", "float32", "--served-model-name", "real", "--enable-lora", "--max-lora-rank", "8")
    with server(VLLM, "serve", served / "real", *options, "--lora-modules", f"tuned={served / 'lora'}") as port:
        assert completion(port, "tuned") == says(served / "plugged")
        assert completion(port, "real") == says(served / "real")
