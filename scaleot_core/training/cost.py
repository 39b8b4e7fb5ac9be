"""Measure what a stage costs: seconds, peak memory, and tokens through the model."""

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common.runtime import Runtime
from scaleot_core.models.families import decoder_stack


def peak_memory() -> int:
    """Measure the most memory (bytes) that this process has held so far."""
    try:
        import resource
    except ImportError:
        import psutil

        held = psutil.Process().memory_info()
        return int(getattr(held, "peak_wset", held.rss))  # Windows keeps a peak; what has neither tells of now
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # KiB, but bytes on macOS


class Meter:
    """Wall-clock seconds and peak memory (MiB, of the process and of the GPU) since it was made, and counted tokens."""

    def __init__(self, runtime: Runtime) -> None:
        self.start = time.perf_counter()
        self.tokens = 0
        self.gpu = runtime.device.type == "cuda"
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def count(self, model: PreTrainedModel) -> None:
        """Count from here on the tokens that go through a model's forward pass, padding among them."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            inputs = (*args, options.get("input_ids"), options.get("inputs_embeds"))
            tokens = next(tensor for tensor in inputs if tensor is not None)
            self.tokens += tokens.shape[0] * tokens.shape[1]

        stack = model.get_submodule(decoder_stack(model.config))
        stack.register_forward_pre_hook(hook, with_kwargs=True)

    def read(self) -> dict[str, float]:
        """Return what was measured so far, by its names in cost files."""
        measured: dict[str, float] = {
            "tokens": self.tokens,
            "seconds": round(time.perf_counter() - self.start, 1),
            "peak_memory_mib": round(peak_memory() / 2**20),
        }
        if self.gpu:
            measured["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        return measured
