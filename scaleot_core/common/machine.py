"""Name the kind of machine: what two machines must share for the same parameters to give the same bytes on both.

Every stage depends on it, so that DVC looks for a run of this kind where the lock in git has another kind's outputs.
"""

from typing import Any

import joblib
import torch


def machine_kind(device: str) -> dict[str, Any]:
    """Describe what computes: the CPU's vector instructions and number, or, unless `device` is cpu, the GPU's name."""
    if device != "cpu" and torch.cuda.is_available():
        return {"gpu": torch.cuda.get_device_name()}
    bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "bfloat16": bfloat16, "count": joblib.cpu_count()}
