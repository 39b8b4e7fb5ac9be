"""Run one stage as several processes, which `accelerate launch` starts: each takes its share of every batch.

All hold the model and draw the same batches; gradients are summed before each update, so that all keep the same
weights, and those of one process alone within float error. The first process writes; what the others would write is
dropped. Accelerate does the talking between them; one process alone never imports it.

With `accelerate launch --use_fsdp` each process holds only its part of every decoder layer while it trains (FSDP2), so
that weights, gradients and moments may be more than one device has; then all must take part in every pass.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scaleot_core.common.launch import is_main_process, rank, world_size

TIMEOUT = timedelta(hours=24)  # with which the others wait while the first evaluates
Batch = TypeVar("Batch", Tensor, list[Any])


def init_process_group(*, cpu: bool) -> torch.device:
    """Meet the other processes and return the device of this one; to be called once, before anything is shared."""
    from accelerate import PartialState

    device: torch.device = PartialState(cpu=cpu, timeout=TIMEOUT).device
    return device


def fsdp_enabled() -> bool:
    """Tell whether decoder layers are split over the processes, as `accelerate launch --use_fsdp` asks for."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard_layers(layers: Iterable[nn.Module]) -> None:
    """Keep only this process's part of each layer, where layers are split; gradients are summed over processes."""
    if not fsdp_enabled():
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for layer in layers:
        # each layer stands alone, so that FSDP would take it for a root, whose weights stay put together
        sharded = fully_shard(
            layer,
            mesh=_mesh(),
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


@cache
def _mesh() -> Any:
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(PartialState().device.type, (world_size(),))


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is only one process's part of what it stands for."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Put a split tensor together, for which all processes must call; any other is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Put a whole tensor where `like` is: on its device, and split as it is where it is split."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def shard_batch(batch: Batch) -> Batch:
    """Take this process's part of a batch, which may be empty."""
    return batch[rank() :: world_size()]


def all_reduce_sum(value: float) -> float:
    """Sum a number over the processes; all must call."""
    if world_size() == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import reduce

    mine = torch.tensor(value, dtype=torch.float64, device=PartialState().device)
    return float(reduce(mine, "sum").item())


def broadcast_from_main(measure: Callable[[], Any]) -> Any:
    """Measure in the first process and return that in all of them; where layers are split, all take part."""
    if world_size() == 1:
        return measure()
    from accelerate.utils import broadcast_object_list

    measured = [measure() if is_main_process() or fsdp_enabled() else None]
    return broadcast_object_list(measured)[0]


def any_process(flag: bool) -> bool:
    """Tell whether a flag is set in any process; all must call."""
    return all_reduce_sum(float(flag)) > 0 if world_size() > 1 else flag


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def group_by_sharding(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters into whole and split ones, which one update can't mix; empty groups are left out."""
    parameters = list(parameters)
    groups = [[p for p in parameters if is_sharded(p) == parts] for parts in (False, True)]
    return [group for group in groups if group]
