"""Tuning a package that takes more memory than there is ends before it starts, with what would fit."""

import pytest
import torch
from helpers import make_emulator, refused, tiny_model, write_package

from scaleot_core import memory
from scaleot_core.exchange.package import Package
from scaleot_core.memory import tuning_bytes
from scaleot_core.training.optimizer import Optimizer


@pytest.fixture
def package(tmp_path, tokenizer):
    return Package(write_package(tmp_path / "package", tiny_model("llama"), tokenizer))


def test_whole_layers_take_masters_gradients_and_moments_as_the_optimizer_has_them(package):
    emulator = tiny_model("llama")
    make_emulator(emulator)
    trained = dict(emulator.model.layers[1].named_parameters())
    optimizer = Optimizer(trained)
    for parameter in trained.values():
        parameter.requires_grad_().grad = torch.ones_like(parameter)
    gradients = sum(parameter.grad.nbytes for parameter in trained.values())
    optimizer.step(0.1)
    tensors = {t.data_ptr(): t.nbytes for t in [*emulator.parameters(), *optimizer.tensors().values()] if t.numel() > 1}
    assert tuning_bytes(package, whole_layers=True) == gradients + sum(tensors.values())


def test_data_owner_is_told_what_would_fit(package, tmp_path, monkeypatch):
    """Before the package's tensors are read."""
    float32, int8, int4 = (tuning_bytes(package, whole_layers=False, quantize=form) for form in (None, "int8", "int4"))
    assert float32 > int8 > int4 > 0
    (tmp_path / "records.jsonl").write_text('{"text": "a"}\n')
    command = ("tune", package.folder, "--data", tmp_path / "records.jsonl", "--out", tmp_path / "adapter")
    for available, fits in ((int8, "with --quantize int8 it fits"), (int4, "with --quantize int4 it fits")):
        monkeypatch.setattr(memory, "device_memory", lambda device, available=available: available)
        message = refused(*command)
        assert "tuning this package takes at least" in message and fits in message
    monkeypatch.setattr(memory, "device_memory", lambda device: 10)
    assert "a machine with" in refused(*command, "--quantize", "int8")
