"""Choose the kernels that attention and matrix products run on, for the rest of the process."""

import warnings
from functools import cache, partial

import torch
from torch import Tensor
from torch.library import Library

FEW_TOKENS = 512  # in a sequence; up to here torch's plain attention is the faster one in training on a CPU


def choose_attention(device: torch.device, tokens: int) -> None:
    """Choose the attention kernel by the device and the longest sequence's tokens.

    On a CPU the backward pass of the flash kernel takes as long as all matrix products of a step on short sequences.
    Plain attention has none such, but stores the attention weights, which grow with the square of the length.
    """
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu" or tokens > FEW_TOKENS)


def multiply_fast(dtype: torch.dtype) -> None:
    """Have matrix products of a dtype computed in float32 if this CPU has no instructions for the dtype."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    name = supported.get(dtype)
    if name and not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()):
        multiply_in_float32(dtype)


@cache
def multiply_in_float32(dtype: torch.dtype) -> Library:
    """Have a CPU multiply matrices of a 16-bit dtype in float32, and round the product.

    That is what its instructions for the dtype would do. A CPU without them (AVX2 alone, for instance) takes torch's
    loop over single numbers, 6 to 70 times slower. The kernels last as long as the object that is returned.
    """

    def product(out: torch._ops.OpOverload, *operands: Tensor, **factors: float) -> Tensor:
        target = operands[-1].dtype
        if target == dtype:
            operands = tuple(operand.float() for operand in operands)
        *batch, rows, _ = operands[-2].shape
        result = operands[-1].new_empty(*batch, rows, operands[-1].shape[-1])
        return out(*operands, **factors, out=result).to(target)

    aten, kernels = torch.ops.aten, Library("aten", "IMPL")
    with warnings.catch_warnings():  # that kernels are replaced is the purpose
        warnings.simplefilter("ignore", UserWarning)
        for out in (aten.mm.out, aten.addmm.out, aten.bmm.out, aten.baddbmm.out):
            kernels.impl(out.overloadpacket.__name__, partial(product, out), "CPU")
    return kernels
