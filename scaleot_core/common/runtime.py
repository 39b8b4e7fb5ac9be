"""Set up what every stage computes with: device, dtype, kernels, CPU threads, the allocator, random draws."""

import ctypes
import hashlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.library import Library
from transformers.utils import logging as transformers_logging

from scaleot_core.common.distributed import init_process_group
from scaleot_core.common.errors import UserError
from scaleot_core.common.launch import local_world_size, world_size
from scaleot_core.common.progress import say

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEW_TOKENS = 512  # in a sequence; up to here torch's plain attention is the faster one in training on a CPU


@dataclass(frozen=True)
class Runtime:
    """Where and in what precision a stage computes."""

    device: torch.device
    dtype: torch.dtype


class Settings(Protocol):
    """What decides how to compute: `Params`, or a command's options."""

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def threads(self) -> int: ...


def choose_attention(device: torch.device, tokens: int) -> None:
    """Choose the attention kernel, for the rest of the process, by the device and the longest sequence's tokens.

    On a CPU the backward pass of the flash kernel takes as long as all matrix products of a step on short sequences;
    plain attention has none such, but keeps the weights of attention, which grow with the square of the length.
    """
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu" or tokens > FEW_TOKENS)


@cache
def multiply_in_float32(dtype: torch.dtype) -> Library:
    """Have a CPU multiply matrices of a 16-bit dtype in float32, and round the product, for the rest of the process.

    That is what its instructions for the dtype would do. A CPU without them (AVX2 alone, for instance) takes torch's
    loop over single numbers, 6 to 70 times slower. The kernels last as long as the object that is returned and kept.
    """

    def product(out: torch._ops.OpOverload, *operands: Tensor, **factors: float) -> Tensor:
        target = operands[-1].dtype
        if target == dtype:
            operands = tuple(operand.float() for operand in operands)
        *batch, rows, _ = operands[-2].shape
        result = operands[-1].new_empty(*batch, rows, operands[-1].shape[-1])
        return out(*operands, **factors, out=result).to(target)

    aten, kernels = torch.ops.aten, Library("aten", "IMPL")
    with warnings.catch_warnings():  # that kernels are replaced is what is wanted here
        warnings.simplefilter("ignore", UserWarning)
        for out in (aten.mm.out, aten.addmm.out, aten.bmm.out, aten.baddbmm.out):
            kernels.impl(out.overloadpacket.__name__, partial(product, out), "CPU")
    return kernels


def _has_instructions(dtype: torch.dtype) -> bool:
    """Say whether torch has fast matrix products of a dtype on this CPU."""
    supported = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    name = supported.get(str(dtype).removeprefix("torch."))
    return name is None or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)())


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of paging them in anew at every step; without glibc do nothing.

    Paging took half of the CPU time of the local fits, which run 2.5 times as fast with it. For loops whose steps all
    have the same shapes: where they differ, as in tuning, kept blocks pile up in the gaps between others.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**30)
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Have glibc give every freed block of a MiB and more back at once, so that none pile up."""
    _mallopt(M_MMAP_THRESHOLD, 2**20)


def _mallopt(option: int, value: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none, Windows not even the way to it
        return
    mallopt(option, value)


def cpu_count() -> int:
    """Count the CPUs that this process may use: its affinity, its cgroup's quota, OMP_NUM_THREADS, whichever is least.

    Affinity is Linux's alone; elsewhere all CPUs of the machine stand for it.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    available = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(available, math.ceil(min(cpu_quota(), available)), _omp_threads() or available))


def thread_count() -> int:
    """Choose this process's CPU threads: OMP_NUM_THREADS where it is set, else its share of the CPUs."""
    return cpu_count() if _omp_threads() else max(1, cpu_count() // local_world_size())


def _omp_threads() -> int | None:
    """Read OMP_NUM_THREADS, of whose list the outermost level counts; None where it has no number above 0."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def cpu_quota(root: Path = Path("/")) -> float:
    """Read the CPU quota, in CPUs, of this process's cgroup and those around it; infinity where there is none.

    Containers and batch systems set it: `cpu.max` in version 2 of cgroups, `cpu.cfs_quota_us` in version 1.
    """
    return min(map(_quota_of, cgroup_folders("cpu", root)), default=math.inf)


def cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders in which a controller's limits would lie: of this process's cgroup, and of those around it.

    In version 1 of cgroups a controller has a mount of its own, by its name or by the names of all that share it.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for name in {controller, controllers} if controllers else {""}:
            mount = root / "sys/fs/cgroup" / name
            folder = mount / path.lstrip("/")
            yield from (level for level in (folder, *folder.parents) if level.is_relative_to(mount))


def _quota_of(folder: Path) -> float:
    """Read the CPU quota of one cgroup, in CPUs; infinity where it has none."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            if int(quota) > 0:  # -1 is none in version 1, `max` in version 2
                return int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf


def setup(settings: Settings, label: str) -> Runtime:
    """Set threads and deterministic kernels, pick the device, say so; UserError if the GPU asked for isn't there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': no GPU is visible here; use auto or cpu")
    if world_size() > 1:
        device = init_process_group(cpu=settings.device == "cpu" or not torch.cuda.is_available())
    else:
        device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(settings.threads or thread_count())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
    torch.use_deterministic_algorithms(True)
    # It takes 2 % of a training step, and nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    dtype = DTYPES[settings.dtype]
    if device.type == "cpu" and not _has_instructions(dtype):
        multiply_in_float32(dtype)
    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    processes = f"{world_size()} processes, each with " if world_size() > 1 else ""
    threads = torch.get_num_threads()
    say(f"{label}: on {device.type} in {settings.dtype}, {processes}{threads} threads", style="bold")
    return Runtime(device, dtype)


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Make a CPU generator for one named draw, so that a resumed run draws what the uninterrupted one would have."""
    text = ":".join(str(part) for part in (seed, *names))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
