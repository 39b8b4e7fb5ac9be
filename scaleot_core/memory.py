"""What a stage, or tuning a package, takes of its device's memory at the least: told before it starts.

Weights, gradients and optimizer states are counted, activations aren't: what is refused here could not have run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import folder_bytes
from scaleot_core.common.launch import world_size
from scaleot_core.common.runtime import DTYPES, Runtime
from scaleot_core.settings import Frozen

if TYPE_CHECKING:
    from scaleot_core.exchange.package import Package

TRAINED = 16  # bytes of a trained weight: in float32, with its gradient and AdamW's two moments
FROZEN_BYTES: dict[Frozen, float] = {"int8": 1, "int4": 0.5 + 4 / 64}  # of a number; int4 with a scale for 64
SPLIT = ("train_harmonizers", "offsite_tune", "full_finetune")  # stages whose layers several GPUs share


def device_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Give the memory (bytes) of a GPU, or what this process may have of the machine's, with swap."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    limits = [psutil.virtual_memory().total + psutil.swap_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: cgroups of version 2 and 1
        try:
            limits.append(int((root / "sys/fs/cgroup" / name).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # there is none, or it says `max`
            continue
    return min(limits)


def tuning_bytes(package: "Package", *, whole_layers: bool, frozen: Frozen | None = None) -> float:
    """Count what tuning adapters in a package takes: the emulator, and what is trained of the adapter layers."""
    from scaleot_core.compression.emulator import tensor_shapes
    from scaleot_core.exchange.quantized import FROZEN_PARTS

    dtype, total = DTYPES[package.manifest.dtype], 0.0
    for part, shapes in tensor_shapes(package.meta_model, package.plan).items():
        numbers = sum(math.prod(shape) for shape, _ in shapes.values())
        total += numbers * (FROZEN_BYTES[frozen] if frozen and part in FROZEN_PARTS else dtype.itemsize)
        total += numbers * TRAINED if whole_layers and part == "adapter" else 0
    return total


def stage_bytes(stage: str, item: Mapping[str, str], artifacts: Artifacts, dtype: torch.dtype) -> float:
    """Count what a stage of the pipeline takes, by the sizes of the artifacts that it reads; 0 where it streams."""
    model, size = folder_bytes(artifacts.model, ".safetensors"), dtype.itemsize
    if stage == "offsite_tune":
        from scaleot_core.exchange.package import Package

        return tuning_bytes(Package(artifacts.emulator, links=True), whole_layers=item["adapters"] == "layers")
    if stage == "full_finetune":
        return model / size * TRAINED
    if stage == "attack":
        return folder_bytes(artifacts.emulator, ".safetensors") / size * TRAINED
    if stage == "train_harmonizers":  # stored in float32
        return model + folder_bytes(artifacts.importance, ".safetensors") / 4 * TRAINED
    return model if stage in ("layer_importance", "zero_shot", "evaluate") else 0


def check_stage(stage: str, item: Mapping[str, str], artifacts: Artifacts, runtime: Runtime) -> None:
    """Raise UserError, with what would fit, where a stage takes more memory than there is.

    Processes on CPUs share the machine's memory; on GPUs each has its own, and split layers take a share of it.
    """
    split = stage in SPLIT and runtime.device.type == "cuda"
    need, have = stage_bytes(stage, item, artifacts, runtime.dtype), device_memory(runtime.device)
    if need / (world_size() if split else 1) <= have:
        return
    if split:
        remedy = f"with `launch` over {math.ceil(need / have)} such GPUs its layers fit"
    elif runtime.dtype == torch.float32 and stage not in ("full_finetune", "attack") and need / 2 <= have:
        remedy = "with dtype = bfloat16 it fits"
    else:
        remedy = f"a machine with {_gib(need)} fits, or a model of {have / need:.0%} of the size"
    raise UserError(
        f"{stage}: it takes at least {_gib(need)} of memory, and {_place(runtime)} has {_gib(have)}; {remedy}"
    )


def too_large(artifacts: Artifacts, runtime: Runtime, *, launched: bool) -> list[str]:
    """Say of the stages to come, as far as the model tells, which would be refused; `launched` ones may be split."""
    found = []
    for stage in ("layer_importance", "train_harmonizers", "zero_shot", "full_finetune", "evaluate"):
        try:
            if not (launched and stage in SPLIT):
                check_stage(stage, {}, artifacts, runtime)
        except UserError as error:
            found.append(error.message)
    return found


def check_tuning(package: "Package", runtime: Runtime, *, whole_layers: bool, frozen: Frozen | None) -> None:
    """Raise UserError, with what would fit, where tuning adapters in a package takes more memory than there is."""
    have = device_memory(runtime.device)
    need = tuning_bytes(package, whole_layers=whole_layers, frozen=frozen)
    if need <= have:
        return
    forms: tuple[Frozen, ...] = ("int8", "int4")
    fits = [f for f in forms if tuning_bytes(package, whole_layers=whole_layers, frozen=f) <= have]
    remedy = f"with --frozen {fits[0]} it fits" if fits else f"a machine with {_gib(need)} fits"
    raise UserError(
        f"tuning this package takes at least {_gib(need)} of memory, and {_place(runtime)} has {_gib(have)}; {remedy}"
    )


def _place(runtime: Runtime) -> str:
    return "the GPU" if runtime.device.type == "cuda" else "this machine"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
