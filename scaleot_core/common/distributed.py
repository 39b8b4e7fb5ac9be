"""Several processes for one stage, as `accelerate launch` starts them: each takes its share of every batch.

All hold the model and draw the same batches; gradients are summed before each update, so that all keep the same
weights, and those of one process alone within float error. The first process writes; what the others would write is
dropped. Started plainly, one process is all there is and nothing here costs anything.

With `accelerate launch --use_fsdp` each process holds but its part of every decoder layer while it trains (FSDP2), so
that weights, gradients and moments may be more than one device has; then all must take part in every pass.
"""

import json
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

TIMEOUT = timedelta(hours=24)  # with which the others wait while the first evaluates
Batch = TypeVar("Batch", Tensor, list[Any])


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def init_process_group(*, cpu: bool) -> torch.device:
    """Meet the other processes; the device of this one. To be called once, before anything is shared."""
    from accelerate import PartialState

    device: torch.device = PartialState(cpu=cpu, timeout=TIMEOUT).device
    return device


def fsdp_enabled() -> bool:
    """Whether decoder layers are split over the processes: as Accelerate tells them, by the environment."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard_layers(layers: Iterable[nn.Module]) -> None:
    """Leave of each layer this process's part, where layers are split; their gradients are summed over processes."""
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
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(_device_type(), (world_size(),))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is but one process's part of what it stands for."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is split, all processes must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what belongs beside `like`: this process's part where that is split."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def shard_batch(batch: Batch) -> Batch:
    """This process's part of a batch, which may be none of it."""
    return batch[int(os.environ.get("RANK", "0")) :: world_size()]


def _device_type() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def all_reduce_sum(value: float) -> float:
    """The sum of a number over the processes."""
    if world_size() == 1:
        return value
    summed = torch.tensor([value], dtype=torch.float64, device=_device_type())
    distributed.all_reduce(summed)
    return float(summed.item())


def broadcast_from_main(measure: Callable[[], Any]) -> Any:
    """What the first process measures, as JSON has it, in all of them; all measure where layers are split."""
    if world_size() == 1:
        return measure()
    value = measure() if is_main_process() or fsdp_enabled() else None
    text = json.dumps(value).encode() if is_main_process() else b""
    content = torch.zeros(int(all_reduce_sum(len(text))), dtype=torch.uint8, device=_device_type())
    if is_main_process():
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    distributed.broadcast(content, 0)
    return json.loads(bytes(content.tolist()))


def any_process(flag: bool) -> bool:
    """Whether a flag is up in any process; all must ask."""
    return all_reduce_sum(float(flag)) > 0 if world_size() > 1 else flag


def barrier() -> None:
    """Go on once all processes are here."""
    if world_size() > 1:
        distributed.barrier()


def group_by_sharding(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole parameters and split ones, which can't be mixed in one update; those groups that there are."""
    parameters = list(parameters)
    groups = [[p for p in parameters if is_sharded(p) == parts] for parts in (False, True)]
    return [group for group in groups if group]
