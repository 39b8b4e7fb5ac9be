"""Kernels: products in float32 are exact ones rounded once, where the CPU needs them; attention by length."""

import pytest
import torch

from scaleot_core.common.kernels import choose_attention, multiply_fast, multiply_in_float32


def products(dtype):
    """Every kind of matrix product a model makes, and their gradients."""
    draw = torch.Generator().manual_seed(0)
    one, two, bias = (
        torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in [(5, 700), (700, 3), 3]
    )
    many, more = (torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in [(2, 5, 700), (2, 700, 3)])
    start = torch.randn((2, 5, 3), generator=draw).to(dtype)
    results = [one @ two, many @ more, many @ two, one @ two[:, 0], torch.addmm(bias, one, two, beta=0.5, alpha=2)]
    results += [torch.nn.functional.linear(one, two.T, bias), torch.baddbmm(start, many, more, beta=2)]
    sum(product.float().square().sum() for product in results).backward()
    return [*results, *(each.grad for each in (one, two, bias, many, more))]


@pytest.fixture
def own_kernels():
    """Begins with torch's own kernels, and leaves those that were there before."""
    replaced = multiply_in_float32.cache_info().currsize

    def restore():
        if multiply_in_float32.cache_info().currsize:
            multiply_in_float32(torch.bfloat16)._destroy()
            multiply_in_float32.cache_clear()

    restore()
    yield
    restore()
    if replaced:
        multiply_in_float32(torch.bfloat16)


def test_products_in_float32_are_the_exact_ones_rounded_once(own_kernels):
    before = {dtype: products(dtype) for dtype in (torch.float32, torch.float64)}
    multiply_in_float32(torch.bfloat16)
    for dtype, expected in before.items():
        assert all(map(torch.equal, products(dtype), expected))
    exact = torch.bfloat16
    draw = torch.Generator().manual_seed(1)
    one, two = torch.randn(40, 4096, generator=draw).to(exact), torch.randn(4096, 30, generator=draw).to(exact)
    assert torch.equal(one @ two, (one.float() @ two.float()).to(exact))
    for product, expected in zip(products(exact), before[torch.float64], strict=True):
        assert product.dtype == exact and product.shape == expected.shape
        assert torch.allclose(product.double(), expected, rtol=0.1, atol=0.02 * expected.abs().max().item())


def test_product_of_shapes_that_do_not_fit_is_refused_as_ever(own_kernels):
    multiply_in_float32(torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.ones(2, 3, dtype=torch.bfloat16) @ torch.ones(2, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "has_instructions", "in_float32"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)],
)
def test_products_are_in_float32_where_the_cpu_has_no_instructions(
    own_kernels, monkeypatch, dtype, has_instructions, in_float32
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions, raising=False)
    multiply_fast(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2, 3, dtype=dtype) @ torch.ones(3, 2, dtype=dtype)
    casts = [event for event in profile.events() if event.name == "aten::to"]
    assert bool(casts) == in_float32


@pytest.mark.parametrize(("device", "tokens", "flash"), [("cpu", 32, False), ("cpu", 4096, True), ("cuda", 32, True)])
def test_attention_is_chosen_by_device_and_length(device, tokens, flash):
    before = torch.backends.cuda.flash_sdp_enabled()
    choose_attention(torch.device(device), tokens)
    chosen = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(before)
    assert chosen == flash
