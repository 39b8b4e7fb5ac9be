"""Frozen matrices in fewer bits: near to what they were, and in every family what the matrices multiplied out are."""

import sys

import pytest
import torch
from helpers import CPU, IDS, LORA, PLAN, each_family, logits, move_lora, refusal, tiny_model, write_package
from torch import nn
from transformers.pytorch_utils import Conv1D

from scaleot_core.compression import quantization
from scaleot_core.compression.emulator import part_of
from scaleot_core.compression.quantization import QuantizedMatrix, check_kernels, quantize
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import family

MATRIX = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
BOUNDS = {"int8": 0.009, "int4": 0.1}  # relative error on normal numbers


@pytest.fixture
def form(request):
    """A form; int4 only where its library is."""
    if request.param == "int4":
        pytest.importorskip("bitsandbytes")
    return request.param


each_form = pytest.mark.parametrize("form", ["int8", "int4"], indirect=True)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrix_is_near_to_what_it_was_and_smaller(form, dtype):
    matrix = MATRIX.to(dtype)
    quantized = quantize(matrix, form)
    back = quantized.dequantized()
    assert (back.dtype, quantized.dtype, quantized.shape) == (dtype, dtype, matrix.shape)
    error = float((back.float() - matrix.float()).norm() / matrix.float().norm())
    assert BOUNDS[form] / 2 < error < BOUNDS[form]
    codes = {"int8": 1.0, "int4": 0.5}[form] * matrix.numel()
    assert codes < quantized.stored_bytes <= codes + 4 * {"int8": 48, "int4": 48}[form]


def test_int8_is_exact_in_what_it_can_hold_and_takes_rows_of_zeros():
    matrix = torch.tensor([[127.0, -3.0, 0.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.125]])
    back = quantize(matrix, "int8").dequantized()
    assert torch.equal(back[:2], matrix[:2])
    assert (back[2] - matrix[2]).abs().max() <= 0.5 / 127 / 2 + 1e-7
    assert torch.equal(quantize(torch.zeros(2, 4), "int8").dequantized(), torch.zeros(2, 4))
    again = quantize(quantize(matrix, "int8"), "int8")
    assert torch.equal(again.dequantized(), back)


@each_form
@pytest.mark.parametrize("module", ["linear", "without bias", "Conv1D"])
def test_product_and_gradient_are_those_of_the_matrix_multiplied_out(form, module):
    into, out = (48, 64) if module == "Conv1D" else (64, 48)
    made = [Conv1D(out, into) if module == "Conv1D" else nn.Linear(into, out, bias=module == "linear") for _ in "12"]
    quantized = quantize(MATRIX, form)
    bias = {} if module == "without bias" else {"bias": torch.randn(out)}
    made[0].load_state_dict({"weight": quantized, **bias}, assign=True)
    made[1].load_state_dict({"weight": quantized.dequantized(), **bias})
    found = []
    for each in made:
        x = torch.randn(2, 5, into, generator=torch.Generator().manual_seed(4)).requires_grad_()
        y = each.requires_grad_(False)(x)
        (y * y).sum().backward()
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@each_form
def test_autograd_keeps_no_matrix_between_forward_and_backward(form):
    """Which is what the memory is saved by."""
    layer = nn.Linear(64, 48, bias=False)
    layer.load_state_dict({"weight": quantize(MATRIX, form)}, assign=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer.requires_grad_(False)(torch.randn(3, 64, requires_grad=True)).sum()
    assert MATRIX.numel() not in kept


def test_what_is_no_product_is_refused_and_a_module_can_be_moved():
    quantized = quantize(MATRIX, "int8")
    with pytest.raises(NotImplementedError):
        quantized + 1
    layer = nn.Linear(64, 48, bias=False)
    layer.load_state_dict({"weight": quantized}, assign=True)
    moved = layer.to("meta").weight
    assert moved.device.type == "meta" and moved.codes.device.type == "meta" and moved.scales.device.type == "meta"


@pytest.mark.slow
@each_form
@each_family
def test_lora_is_tuned_beside_quantized_matrices_of_every_family(tmp_path, tokenizer, form, name):
    """Only harmonizers and compressed layers are quantized, and nothing but LoRA gets a gradient."""
    package = Package(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    model, whole = package.load(CPU, form), package.load(CPU)
    path = family(model.config).layers
    frozen = {n for n, p in whole.named_parameters() if part_of(n, path, PLAN) in ("harmonizer", "compressed")}
    for key, parameter in model.named_parameters():
        assert isinstance(parameter, QuantizedMatrix) == (key in frozen and parameter.dim() == 2)
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if isinstance(parameter, QuantizedMatrix):
                whole.get_parameter(key).copy_(parameter.dequantized())
    torch.testing.assert_close(logits(model), logits(whole))
    gradients = []
    for each in (model, whole):
        move_lora(each, PLAN, LORA)
        parameters = {n: p.requires_grad_() for n, p in each.named_parameters() if ".lora_" in n}
        each(IDS).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in parameters.items()})
        assert all(p.grad is None for n, p in each.named_parameters() if n not in parameters)
    for key, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)


def test_machine_without_the_library_or_its_kernels_is_told_what_to_do(monkeypatch):
    check_kernels("int8", CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refusal(check_kernels, "int4", CPU) == "quantize = 'int4': it needs bitsandbytes: pip install '.[int4]'"


def fails(matrix, form):
    raise RuntimeError("no native part\nmore")


def doubles(matrix, form):
    return quantize(matrix * 2, "int8")


@pytest.mark.parametrize(
    ("broken", "said"), [(fails, "no kernels for cpu here (no native part)"), (doubles, "are wrong on cpu here")]
)
def test_kernels_that_fail_or_are_wrong(monkeypatch, broken, said):
    monkeypatch.setattr(quantization, "_bitsandbytes", lambda: None)
    monkeypatch.setattr(quantization, "quantize", broken)
    message = refusal(check_kernels, "int4", CPU)
    assert said in message and "use int8" in message and "\n" not in message
