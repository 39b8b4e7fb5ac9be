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
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

PATIENCE = timedelta(hours=24)  # with which the others wait while the first evaluates

Batch = TypeVar("Batch", Tensor, list[Any])


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join(*, cpu: bool) -> torch.device:
    """Meet the other processes; the device of this one. To be called once, before anything is shared."""
    from accelerate import PartialState

    device: torch.device = PartialState(cpu=cpu, timeout=PATIENCE).device
    return device


def splits() -> bool:
    """Whether decoder layers are split over the processes: as Accelerate tells them, by the environment."""
    return size() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def split(layers: Iterable[nn.Module]) -> None:
    """Leave of each layer this process's part, where layers are split; their gradients are summed over processes."""
    if not splits():
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

    return init_device_mesh(_place(), (size(),))


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is but one process's part of what it stands for."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is split, all processes must ask."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what belongs beside `like`: this process's part where that is split."""
    if not is_split(like) or is_split(tensor):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def share(batch: Batch) -> Batch:
    """This process's part of a batch, which may be none of it."""
    return batch[int(os.environ.get("RANK", "0")) :: size()]


def _place() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def total(value: float) -> float:
    """The sum of a number over the processes."""
    if size() == 1:
        return value
    summed = torch.tensor([value], dtype=torch.float64, device=_place())
    distributed.all_reduce(summed)
    return float(summed.item())


def from_first(measure: Callable[[], Any]) -> Any:
    """What the first process measures, as JSON has it, in all of them; all measure where layers are split."""
    if size() == 1:
        return measure()
    value = measure() if is_first() or splits() else None
    text = json.dumps(value).encode() if is_first() else b""
    content = torch.zeros(int(total(len(text))), dtype=torch.uint8, device=_place())
    if is_first():
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    distributed.broadcast(content, 0)
    return json.loads(bytes(content.tolist()))


def anywhere(flag: bool) -> bool:
    """Whether a flag is up in any process; all must ask."""
    return total(float(flag)) > 0 if size() > 1 else flag


def wait() -> None:
    """Go on once all processes are here."""
    if size() > 1:
        distributed.barrier()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the processes, of those parameters that any of them has one for.

    Those of split layers are sums already.
    """
    parameters = [p for p in parameters if not is_split(p)]
    if size() == 1 or not parameters:
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=_place())
    distributed.all_reduce(there)
    for parameter, count in zip(parameters, there.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale gradients down to a common norm of `most`, over split and whole parameters."""
    groups = by_split(parameters)
    norms = [whole(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in groups:
        clip_grads_with_norm_(group, most, norm)


def by_split(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole parameters and split ones, which can't be mixed in one update; those groups that there are."""
    parameters = list(parameters)
    groups = [[p for p in parameters if is_split(p) == parts] for parts in (False, True)]
    return [group for group in groups if group]


def backward(batch: Batch, loss: Callable[[Batch], Tensor], weigh: Callable[[Batch], float] = len) -> float:
    """Backpropagate the mean loss of a batch, each process that of its share; the loss of the whole.

    `loss` gives the mean over what it is called with, and `weigh` over how many that is.
    """
    mine = share(batch)
    value = 0.0
    if len(mine):
        own = loss(mine)
        if len(mine) < len(batch):
            own = own * (weigh(mine) / weigh(batch))
        own.backward()
        value = own.item()
    elif splits():
        (loss(batch[:1]) * 0).backward()  # the others wait for this process's part of the layers
    return total(value)
