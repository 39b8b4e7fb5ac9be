"""What a stage, or tuning a package, takes of its device's memory at the least: told before it starts.

Weights, gradients and optimizer states are counted, activations aren't: what is refused here could not have run.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.distributed import fsdp_enabled
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import folder_bytes
from scaleot_core.common.launch import local_world_size, world_size
from scaleot_core.common.runtime import DTYPES, Runtime, cgroup_folders
from scaleot_core.settings import Quantization

if TYPE_CHECKING:
    from scaleot_core.exchange.package import Package

QUANTIZED_BYTES: dict[Quantization, float] = {"int8": 1, "int4": 0.5 + 4 / 64}  # of a number; int4 with a scale for 64
# Stages whose layers the processes of FSDP share.
SPLIT = ("train_harmonizers", "compress, method distilled", "full_finetune", "attack")


@dataclass(frozen=True)
class Weights:
    """How many numbers are held, and how many of these are trained."""

    held: float = 0
    """In the dtype; a quantized one counts as less."""
    trained: float = 0

    def bytes(self, dtype: torch.dtype) -> float:
        """Count what they take: of a trained one a float32 master too, its gradient and AdamW's two moments."""
        own = 0 if dtype == torch.float32 else dtype.itemsize  # in float32 a weight is its own master
        return (self.held - self.trained) * dtype.itemsize + self.trained * (own + 16)


def device_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Give the memory (bytes) of a GPU, or what this process may have of the machine's, with swap."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    swap = psutil.swap_memory().total
    return min([psutil.virtual_memory().total + swap, *_cgroup_limits(root, swap)])


def _cgroup_limits(root: Path, swap: int) -> Iterator[int]:
    """Yield the limits (bytes, with swap) of this process's cgroups and those around them, of version 1 and 2."""
    for folder in cgroup_folders("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (limit := _number(folder / name)) is not None:
                allowed = _number(folder / "memory.swap.max")
                yield limit + (swap if allowed is None else allowed)


def _number(file: Path) -> int | None:
    """Read a limit; None where there is none, or it says `max`."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def tuning_weights(package: "Package", *, whole_layers: bool, quantize: Quantization | None = None) -> Weights:
    """Count what tuning adapters in a package holds: the emulator, of which whole adapter layers are trained, or none.

    LoRA's own weights are left out.
    """
    from scaleot_core.compression.emulator import tensor_shapes
    from scaleot_core.exchange.int8 import QUANTIZED_PARTS

    size, held, trained = DTYPES[package.manifest.dtype].itemsize, 0.0, 0.0
    for part, shapes in tensor_shapes(package.meta_model, package.plan).items():
        numbers = sum(math.prod(shape) for shape, _ in shapes.values())
        held += numbers * (QUANTIZED_BYTES[quantize] / size if quantize and part in QUANTIZED_PARTS else 1)
        trained += numbers if whole_layers and part == "adapter" else 0
    return Weights(held, trained)


def stage_weights(stage: str, item: Mapping[str, str], artifacts: Artifacts, dtype: torch.dtype) -> Weights:
    """Count what a stage of the pipeline holds, by the artifacts that it reads; nothing where it streams.

    `compress` streams but by the method `distilled`, which counts for itself.
    """
    model = folder_bytes(artifacts.model, ".safetensors") / dtype.itemsize
    if stage == "offsite_tune":
        from scaleot_core.exchange.manifest import MANIFEST
        from scaleot_core.exchange.package import Package

        if not (artifacts.emulator / MANIFEST).is_file():
            return Weights()  # the stage itself says what is missing
        return tuning_weights(Package(artifacts.emulator, links=True), whole_layers=item["adapters"] == "layers")
    if stage == "full_finetune":
        return Weights(model, model)
    if stage == "attack":
        emulator = folder_bytes(artifacts.emulator, ".safetensors") / dtype.itemsize
        return Weights(emulator, emulator)
    if stage == "train_harmonizers":
        harmonizers = folder_bytes(artifacts.importance, ".safetensors") / torch.float32.itemsize
        return Weights(model + harmonizers, harmonizers)
    return Weights(model) if stage in ("layer_importance", "zero_shot", "evaluate") else Weights()


def check_stage(stage: str, item: Mapping[str, str], artifacts: Artifacts, runtime: Runtime) -> None:
    """Check a stage by the artifacts that it reads; UserError as `check_weights` raises it."""
    check_weights(stage, stage_weights(stage, item, artifacts, runtime.dtype), runtime)


def check_weights(stage: str, weights: Weights, runtime: Runtime) -> None:
    """Raise UserError, with what would fit, where a stage's weights take more memory than there is.

    Each process holds all of it, on CPUs in the same memory; under FSDP they share the layers of the stages that train.
    """
    have, gpu = device_memory(runtime.device), runtime.device.type == "cuda"
    if stage in SPLIT and fsdp_enabled():
        copies = 1 / world_size() if gpu else 1.0
    else:
        copies = 1.0 if gpu else local_world_size()
    need = weights.bytes(runtime.dtype) * copies
    if need <= have:
        return
    if gpu and stage in SPLIT:
        count = math.ceil(weights.bytes(runtime.dtype) / have)
        remedy = f"with `launch` over {count} such GPUs and --use_fsdp its layers fit (docs/distributed.md)"
    elif runtime.dtype == torch.float32 and weights.bytes(torch.bfloat16) * copies <= have:
        remedy = "with dtype = bfloat16 it fits"
    else:
        remedy = f"a machine with {_gib(need)} fits, or a model of {have / need:.0%} of the size"
    raise UserError(
        f"{stage}: it takes at least {_gib(need)} of memory, and {_place(runtime)} has {_gib(have)}; {remedy}"
    )


def too_large(artifacts: Artifacts, runtime: Runtime, *, split: bool) -> list[str]:
    """Say of the stages to come, as far as the model tells, which would be refused, but for those that are split."""
    found = []
    for stage in ("layer_importance", "train_harmonizers", "zero_shot", "full_finetune", "evaluate"):
        try:
            if not (split and stage in SPLIT):
                check_stage(stage, {}, artifacts, runtime)
        except UserError as error:
            found.append(error.message)
    return found


def check_tuning(package: "Package", runtime: Runtime, *, whole_layers: bool, quantize: Quantization | None) -> None:
    """Raise UserError, with what would fit, where tuning adapters in a package takes more memory than there is."""
    have, dtype = device_memory(runtime.device), DTYPES[package.manifest.dtype]

    def taken(form: Quantization | None) -> float:
        return tuning_weights(package, whole_layers=whole_layers, quantize=form).bytes(dtype)

    if (need := taken(quantize)) <= have:
        return
    fits = [form for form in QUANTIZED_BYTES if taken(form) <= have]
    remedy = f"with --quantize {fits[0]} it fits" if fits else f"a machine with {_gib(need)} fits"
    raise UserError(
        f"tuning this package takes at least {_gib(need)} of memory, and {_place(runtime)} has {_gib(have)}; {remedy}"
    )


def _place(runtime: Runtime) -> str:
    return "the GPU" if runtime.device.type == "cuda" else "this machine"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
