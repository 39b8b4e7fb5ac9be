"""Set up what every stage computes with: device, dtype, CPU threads, deterministic kernels."""

import logging
import os
import sys
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers.utils import logging as transformers_logging

from scaleot_core.common.distributed import init_process_group
from scaleot_core.common.errors import UserError
from scaleot_core.common.kernels import multiply_fast
from scaleot_core.common.launch import local_world_size, world_size
from scaleot_core.common.progress import say

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


def cpu_count() -> int:
    """Count the CPUs that this process may use by its affinity, its cgroup's quota and OMP_NUM_THREADS."""
    import joblib  # takes a third of a second

    return min(joblib.cpu_count(), _omp_threads() or sys.maxsize)


def thread_count() -> int:
    """Choose this process's CPU threads: OMP_NUM_THREADS where it is set, else its share of the CPUs."""
    return cpu_count() if _omp_threads() else max(1, cpu_count() // local_world_size())


def _omp_threads() -> int | None:
    """Read OMP_NUM_THREADS, the outermost level of a list; None unless it is a number above 0."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(outermost) if outermost.isdecimal() and int(outermost) else None


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
    if device.type == "cpu":
        multiply_fast(dtype)
    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    processes = f"{world_size()} processes, each with " if world_size() > 1 else ""
    threads = torch.get_num_threads()
    say(f"{label}: on {device.type} in {settings.dtype}, {processes}{threads} threads", style="bold")
    return Runtime(device, dtype)
