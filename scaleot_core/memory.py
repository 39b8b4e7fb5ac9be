"""Lower bounds on the memory that tuning a package takes, checked before its tensors are read.

Weights, gradients and optimizer states are counted, activations aren't: what is refused here could not have run.
"""

import math
from typing import TYPE_CHECKING

import torch

from scaleot_core.common.errors import UserError
from scaleot_core.common.runtime import DTYPES, Runtime
from scaleot_core.settings import Quantization

if TYPE_CHECKING:
    from scaleot_core.exchange.package import Package

QUANTIZED_BYTES: dict[Quantization, float] = {"int8": 1, "int4": 0.5 + 4 / 64}  # of a number; int4 with a scale for 64


def device_memory(device: torch.device) -> int:
    """Return the memory (bytes) of a GPU, or the machine's with swap."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total + psutil.swap_memory().total


def tuning_bytes(package: "Package", *, whole_layers: bool, quantize: Quantization | None = None) -> float:
    """Count the bytes of the emulator while adapters are tuned in it: whole adapter layers, or LoRA.

    A trained number takes a float32 master, its gradient and AdamW's two moments as well. LoRA's own numbers are left
    out; `quantize` quantizes the others.
    """
    from scaleot_core.compression.emulator import tensor_shapes
    from scaleot_core.exchange.int8 import QUANTIZED_PARTS

    dtype, total = DTYPES[package.manifest.dtype], 0.0
    trained = 16 + (0 if dtype == torch.float32 else dtype.itemsize)  # in float32 a weight is its own master
    for part, shapes in tensor_shapes(package.meta_model, package.plan).items():
        size = QUANTIZED_BYTES[quantize] if quantize and part in QUANTIZED_PARTS else dtype.itemsize
        total += sum(math.prod(shape) for shape, _ in shapes.values()) * (
            trained if whole_layers and part == "adapter" else size
        )
    return total


def check_tuning(package: "Package", runtime: Runtime, *, whole_layers: bool, quantize: Quantization | None) -> None:
    """Raise UserError, with what would fit, if tuning adapters in a package takes more memory than the device has."""
    available = device_memory(runtime.device)
    needed = tuning_bytes(package, whole_layers=whole_layers, quantize=quantize)
    if needed <= available:
        return
    fits = [f for f in QUANTIZED_BYTES if tuning_bytes(package, whole_layers=whole_layers, quantize=f) <= available]
    remedy = f"with --quantize {fits[0]} it fits" if fits else f"a machine with {_gib(needed)} fits"
    place = "the GPU" if runtime.device.type == "cuda" else "this machine"
    raise UserError(
        f"tuning this package takes at least {_gib(needed)} of memory, and {place} has {_gib(available)}; {remedy}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
