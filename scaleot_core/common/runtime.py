"""What every stage needs around its work: device, dtype, seeds, cost."""

import ctypes
import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from scaleot_core.common import distributed
from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import say

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


def setup(settings: Settings, label: str) -> Runtime:
    """Set threads and deterministic kernels, pick the device, say so; UserError if the GPU asked for isn't there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': no GPU is visible here; use auto or cpu")
    if distributed.world_size() > 1:
        device = distributed.init_process_group(cpu=settings.device == "cpu" or not torch.cuda.is_available())
    else:
        device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // distributed.world_size()))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
    torch.use_deterministic_algorithms(True)
    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    processes = f"{distributed.world_size()} processes, each with " if distributed.world_size() > 1 else ""
    threads = torch.get_num_threads()
    say(f"{label}: on {device.type} in {settings.dtype}, {processes}{threads} threads", style="bold")
    return Runtime(device, DTYPES[settings.dtype])


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one named draw, so that a resumed run draws what the uninterrupted one would have."""
    text = ":".join(str(part) for part in (seed, *names))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def secret_draw(seed: int, *names: str | int) -> np.random.Generator:
    """A generator for one named draw that protects privacy: of 256 bits, where torch's has 32 that count.

    Not a cryptographic one.
    """
    text = ":".join(str(part) for part in (seed, *names))
    entropy = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(entropy)))
