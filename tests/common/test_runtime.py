"""Around a stage: named draws, the device, its cost, and how it ends."""

import os
from typing import get_args

import pytest
import torch
from helpers import refusal
from transformers.utils import logging

from scaleot_core.common import runtime
from scaleot_core.common.kernels import choose_attention, multiply_in_float32
from scaleot_core.common.random import generator
from scaleot_core.common.runtime import DTYPES, Runtime, setup
from scaleot_core.params import Params

CPU = Runtime(torch.device("cpu"), torch.float32)

# --- kernels -------------------------------------------------------------------------------------------------


def products(dtype):
    """Every kind of matrix product a model makes, and their gradients."""
    draw = torch.Generator().manual_seed(0)
    one, two, bias = (
        torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in [(5, 700), (700, 3), 3]
    )
    many, more = (torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in [(2, 5, 700), (2, 700, 3)])
    start = torch.randn((2, 5, 3), generator=draw).to(dtype)
    made = [one @ two, many @ more, many @ two, one @ two[:, 0], torch.addmm(bias, one, two, beta=0.5, alpha=2)]
    made += [torch.nn.functional.linear(one, two.T, bias), torch.baddbmm(start, many, more, beta=2)]
    sum(product.float().square().sum() for product in made).backward()
    return [*made, *(each.grad for each in (one, two, bias, many, more))]


@pytest.fixture
def in_float32():
    """Has bfloat16 products computed in float32, and torch's own kernels back afterwards."""
    kept = runtime.multiply_in_float32.cache_info().currsize
    yield lambda: multiply_in_float32(torch.bfloat16)
    if not kept:
        multiply_in_float32(torch.bfloat16)._destroy()
        multiply_in_float32.cache_clear()


def test_products_in_float32_are_the_exact_ones_rounded_once(in_float32):
    before = {dtype: products(dtype) for dtype in (torch.float32, torch.float64)}
    in_float32()
    for dtype, expected in before.items():
        assert all(map(torch.equal, products(dtype), expected))
    exact = torch.bfloat16
    draw = torch.Generator().manual_seed(1)
    one, two = torch.randn(40, 4096, generator=draw).to(exact), torch.randn(4096, 30, generator=draw).to(exact)
    assert torch.equal(one @ two, (one.float() @ two.float()).to(exact))
    for found, expected in zip(products(exact), before[torch.float64], strict=True):
        assert found.dtype == exact and found.shape == expected.shape
        assert torch.allclose(found.double(), expected, rtol=0.1, atol=0.02 * expected.abs().max().item())


def test_product_of_shapes_that_do_not_fit_is_refused_as_ever(in_float32):
    in_float32()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.ones(2, 3, dtype=torch.bfloat16) @ torch.ones(2, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "has", "taken"), [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)]
)
def test_setup_multiplies_in_float32_where_the_cpu_has_no_instructions(machine, params, monkeypatch, dtype, has, taken):
    chosen = []
    monkeypatch.setattr(runtime, "multiply_in_float32", chosen.append)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has, raising=False)
    setup(params.model_copy(update={"device": "cpu", "dtype": dtype}), "here")
    assert chosen == ([torch.bfloat16] if taken else [])


@pytest.mark.parametrize(("device", "tokens", "flash"), [("cpu", 32, False), ("cpu", 4096, True), ("cuda", 32, True)])
def test_attention_is_chosen_by_device_and_length(device, tokens, flash):
    before = torch.backends.cuda.flash_sdp_enabled()
    choose_attention(torch.device(device), tokens)
    chosen = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(before)
    assert chosen == flash


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
