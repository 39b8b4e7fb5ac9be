"""Frozen matrices in 8 or 4 bits, which stay so while adapters are tuned beside them (method section 8).

int8 has one scale a row, and is also how packages are shipped. int4 is NF4 of bitsandbytes (QLoRA, Dettmers et al.,
NeurIPS 2023), of 64 numbers to a scale. A matrix is multiplied out for each product, and again in the backward pass:
what autograd keeps in between are the codes. So the figures are those of a model with the matrices multiplied out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.settings import Quantization

LEVELS = 127  # of int8 on either side of zero
BLOCK = 64  # numbers to a scale in int4
WORST = 0.2  # relative error of int4 on normal numbers; 0.09 is right

aten = torch.ops.aten


class QuantizedMatrix(Tensor):
    """A frozen matrix that only its codes and scales are kept of; for autograd and modules a tensor of its `dtype`.

    It can be multiplied by (`linear`; `addmm`, as Conv1D does; `@` of its transpose, as Falcon does), copied and moved,
    and nothing else.
    """

    codes: Tensor
    """int8 of the matrix's shape, or uint8, of two numbers each."""
    scales: Tensor
    """In float32: (rows, 1) for int8, one for `BLOCK` numbers for int4."""

    transposed: bool
    """Whether this is the transpose of what codes and scales are of."""

    def __new__(
        cls, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype, transposed: bool = False
    ) -> "QuantizedMatrix":
        """Wrap codes and scales; `shape` is that of what is made here."""
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made: QuantizedMatrix = make(cls, shape, dtype=dtype, device=codes.device)
        made.codes, made.scales, made.transposed = codes, scales, transposed
        return made

    def dequantized(self) -> Tensor:
        """Compute the matrix in its dtype."""
        if self.codes.dtype == torch.int8:
            matrix = (self.codes * self.scales).to(self.dtype)
        else:
            library, shape = _bitsandbytes(), self.shape[::-1] if self.transposed else self.shape
            state = library.QuantState(self.scales, shape=shape, dtype=self.dtype, blocksize=BLOCK, quant_type="nf4")
            matrix = library.dequantize_4bit(self.codes, state)
        return matrix.T if self.transposed else matrix

    @property
    def stored_bytes(self) -> int:
        """Count the bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __repr__(self) -> str:  # type: ignore[override]
        """Tell shape and dtypes."""
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype} as {self.codes.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Multiply by it; leave the rest to `__torch_dispatch__`."""
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func is torch.addmm and isinstance(args[2], QuantizedMatrix):
            return _Product.apply(args[1], args[2], args[0], True)
        if func in (Tensor.matmul, Tensor.__matmul__) and isinstance(args[1], QuantizedMatrix):
            return _Product.apply(*args, None, True)
        if func == Tensor.T.__get__:  # type: ignore[attr-defined]
            matrix = args[0]
            return cls(matrix.codes, matrix.scales, matrix.shape[::-1], matrix.dtype, not matrix.transposed)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> "QuantizedMatrix":
        """Copy and move codes and scales as the matrix would be."""
        given, options = args[0], dict(kwargs or {})
        dtype = options.pop("dtype", None) or given.dtype
        if func in (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default):
            codes, scales = (func(part, *args[1:], **options) for part in (given.codes, given.scales))
            return QuantizedMatrix(codes, scales, given.shape, dtype, given.transposed)
        raise NotImplementedError(f"{func} of a quantized matrix: it is there to be multiplied by")


def _linear(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None) -> Tensor:
    return _Product.apply(x, matrix, bias, False)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """x · Wᵀ + b, or x · W + b for a W that is (in, out), of a frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, into_rows: bool) -> Tensor:
        """Multiply (..., in) to (..., out)."""
        ctx.matrix, ctx.into_rows = matrix, into_rows
        weight = matrix.dequantized()
        if into_rows:
            return x @ weight if bias is None else torch.addmm(bias, x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Multiply (..., out) back to (..., in)."""
        weight = ctx.matrix.dequantized()
        return gradient @ (weight.T if ctx.into_rows else weight), None, None, None


def quantize(matrix: Tensor, form: Quantization) -> QuantizedMatrix:
    """Quantize a matrix, from its dtype or from another form, where it is."""
    if isinstance(matrix, QuantizedMatrix) and form == "int8" and matrix.codes.dtype == torch.int8:
        return matrix
    matrix = dequantized(matrix)
    if form == "int8":
        values = matrix.float()
        scales = values.abs().amax(1, keepdim=True) / LEVELS
        scales[scales < torch.finfo(torch.float32).tiny] = 1.0  # of a row of zeros
        codes = (values / scales).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return QuantizedMatrix(codes, scales, matrix.shape, matrix.dtype)
    codes, state = _bitsandbytes().quantize_4bit(matrix.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return QuantizedMatrix(codes, state.absmax, matrix.shape, matrix.dtype)


def dequantized(matrix: Tensor) -> Tensor:
    """Give a matrix, quantized or not, in its dtype."""
    return matrix.dequantized() if isinstance(matrix, QuantizedMatrix) else matrix


def check_kernels(form: Quantization, device: torch.device) -> None:
    """Raise UserError unless matrices can be kept in such a form here: told before a package is read."""
    if form == "int8":
        return
    matrix = torch.randn(BLOCK, BLOCK, generator=torch.Generator().manual_seed(0)).to(device)
    _bitsandbytes()  # whose absence is told in its own line
    try:
        error = float((quantize(matrix, form).dequantized() - matrix).norm() / matrix.norm())
    except Exception as failure:  # whatever a library without its native part ends in
        raise UserError(
            f"bitsandbytes has no kernels for {device.type} here ({one_line(failure)}); use int8",
            parameter="quantize",
            value=form,
        ) from None
    if not error < WORST:
        raise UserError(
            f"bitsandbytes' kernels are wrong on {device.type} here (error {error:.2g}); use int8",
            parameter="quantize",
            value=form,
        )


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UserError("it needs bitsandbytes: pip install '.[int4]'", parameter="quantize", value="int4") from None
    return bitsandbytes.functional
