"""Around a stage: the device, its threads and dtype, said in one line."""

import os
from typing import get_args

import joblib
import pytest
import torch
from helpers import refusal
from transformers.utils import logging

from scaleot_core.common.runtime import DTYPES, setup
from scaleot_core.params import Params


@pytest.fixture
def machine(monkeypatch):
    """Pretends that a GPU is there or not; puts back what `setup` sets for the process."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), logging.get_verbosity()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    yield lambda gpu: monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    logging.set_verbosity(before[2])


@pytest.mark.parametrize(
    ("device", "gpu", "chosen"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_device_is_the_one_asked_for(params, machine, device, gpu, chosen):
    machine(gpu)
    assert setup(params.model_copy(update={"device": device}), "here").device.type == chosen


def test_missing_gpu_is_refused(params, machine):
    machine(gpu=False)
    message = refusal(setup, params.model_copy(update={"device": "cuda"}), "here")
    assert message.startswith("device = 'cuda': ") and "auto or cpu" in message


def test_every_dtype_that_params_allow_is_known():
    assert set(get_args(Params.model_fields["dtype"].annotation)) == DTYPES.keys()
    assert all(str(dtype) == f"torch.{name}" for name, dtype in DTYPES.items())


@pytest.mark.parametrize(("threads", "expected"), [(2, 2), (0, 3)])
def test_setup_sets_precision_threads_and_deterministic_kernels_and_says_so(
    params, machine, monkeypatch, capsys, threads, expected
):
    machine(gpu=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    runtime = setup(params.model_copy(update={"dtype": "float16", "threads": threads}), "compress")
    assert runtime.dtype == torch.float16 and torch.get_num_threads() == expected
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert capsys.readouterr() == ("", f"compress: on cpu in float16, {expected} threads\n")
