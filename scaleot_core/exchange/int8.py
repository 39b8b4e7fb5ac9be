"""Packages of int8: matrices of harmonizers and compressed layers as codes (out, in) with one scale a row."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scaleot_core.common.errors import UserError
from scaleot_core.common.tensors import Shapes
from scaleot_core.compression.plan import LayerKind
from scaleot_core.compression.quantization import LEVELS, QuantizedMatrix, quantize

QUANTIZED_PARTS: tuple[LayerKind, ...] = ("harmonizer", "compressed")  # of which no adapter replaces a weight
SCALES = ".scales"  # behind the name of a matrix


def stored_shapes(parts: Mapping[str, Shapes], quantized: Literal["int8"] | None) -> dict[str, Shapes]:
    """Return the names, shapes and dtypes of what a package stores, from those of the emulator's tensors, by part."""
    return {
        part: _stored(shapes) if quantized and part in QUANTIZED_PARTS else shapes for part, shapes in parts.items()
    }


def _stored(shapes: Shapes) -> Shapes:
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, (shape, dtype) in shapes.items():
        if len(shape) == 2:
            stored |= {name: (shape, torch.int8), f"{name}{SCALES}": ((shape[0], 1), torch.float32)}
        else:
            stored[name] = shape, dtype
    return stored


def stored_tensors(name: str, tensor: Tensor, expected: Shapes) -> dict[str, Tensor]:
    """Return what a package stores of a tensor: codes and scales where `expected` has codes of that name."""
    if expected[name][1] != torch.int8:
        return {name: tensor}
    quantized = quantize(tensor, "int8")
    return {name: quantized.codes, f"{name}{SCALES}": quantized.scales}


def join_scales(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, package: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield a package's tensors, of checked names and in any order; codes and scales become one `QuantizedMatrix`.

    UserError for scales that are not positive, or too large for the dtype.
    """
    waiting: dict[str, Tensor] = {}
    for key, tensor in tensors:
        name = key.removesuffix(SCALES)
        if tensor.dtype != torch.int8 and key == name:
            yield key, tensor
            continue
        waiting[key] = tensor
        if name in waiting and f"{name}{SCALES}" in waiting:
            codes, scales = waiting.pop(name), waiting.pop(f"{name}{SCALES}")
            largest = (scales * (LEVELS + 1)).to(dtype)
            if not bool(((scales > 0) & largest.isfinite()).all()):
                raise UserError(f"{package}: tensor {name!r} has a scale of 0, below it or too large; fetch it again")
            yield name, QuantizedMatrix(codes, scales, codes.shape, dtype)
