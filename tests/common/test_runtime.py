"""Around a stage: named draws, the device, its cost, and how it ends."""

import os
from typing import get_args

import pytest
import torch
from helpers import refusal
from transformers.utils import logging

from scaleot_core.common.runtime import DTYPES, Runtime, generator, setup
from scaleot_core.params import Params

CPU = Runtime(torch.device("cpu"), torch.float32)

# --- named draws -----------------------------------------------------------------------------------------


def draw(*names):
    return torch.rand(4, generator=generator(*names)).tolist()


def test_draw_is_a_function_of_seed_and_names_only():
    first = draw(3, "tuning", 7)
    torch.manual_seed(99)
    draw(3, "tuning", 8)
    assert draw(3, "tuning", 7) == first
    assert generator(0, "harmonizers").initial_seed() == 60932426638459748  # and the same in every process


def test_every_seed_and_name_has_its_own_draws():
    names = [(0,), (1,), (0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), (0, "a", 10), (0, "b", 1)]
    assert len({tuple(draw(*each)) for each in names}) == len(names)


def test_named_draws_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(0, "a")
    assert torch.equal(torch.rand(3), expected)


# --- the device ------------------------------------------------------------------------------------------


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
    ("device", "gpu", "found"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_device_is_the_one_asked_for(params, machine, device, gpu, found):
    machine(gpu)
    assert setup(params.model_copy(update={"device": device}), "here").device.type == found


def test_missing_gpu_is_refused(params, machine):
    machine(gpu=False)
    said = refusal(setup, params.model_copy(update={"device": "cuda"}), "here")
    assert said.startswith("device = 'cuda': ") and "auto or cpu" in said


def test_every_dtype_that_params_allow_is_known():
    assert set(get_args(Params.model_fields["dtype"].annotation)) == DTYPES.keys()
    assert all(str(dtype) == f"torch.{name}" for name, dtype in DTYPES.items())


@pytest.mark.parametrize(("threads", "found"), [(2, 2), (0, 3)])
def test_setup_sets_precision_threads_and_deterministic_kernels_and_says_so(
    params, machine, monkeypatch, capsys, threads, found
):
    machine(gpu=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    got = setup(params.model_copy(update={"dtype": "float16", "threads": threads}), "compress")
    assert got.dtype == torch.float16 and torch.get_num_threads() == found
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert capsys.readouterr() == ("", f"compress: on cpu in float16, {found} threads\n")
