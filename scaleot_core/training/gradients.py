"""Backpropagate a batch over several processes, and sum and clip what comes of it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaleot_core.common.distributed import (
    Batch,
    all_reduce_sum,
    fsdp_enabled,
    full_tensor,
    group_by_sharding,
    is_sharded,
    shard_batch,
    world_size,
)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the processes, of those parameters that any of them has one for.

    Those of split layers are sums already.
    """
    parameters = [p for p in parameters if not is_sharded(p)]
    if world_size() == 1 or not parameters:
        return
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    distributed.all_reduce(has_gradient)
    for parameter, count in zip(parameters, has_gradient.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale gradients down to a common norm of `most`, over split and whole parameters."""
    groups = group_by_sharding(parameters)
    norms = [full_tensor(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in groups:
        clip_grads_with_norm_(group, most, norm)


def backward(batch: Batch, loss: Callable[[Batch], Tensor], weigh: Callable[[Batch], float] = len) -> float:
    """Backpropagate the mean loss of a batch, each process that of its part; return the loss of the whole batch.

    `loss` gives the mean over what it is called with, and `weigh` over how many that is.
    """
    mine = shard_batch(batch)
    value = 0.0
    if len(mine):
        part_loss = loss(mine)
        if len(mine) < len(batch):
            part_loss = part_loss * (weigh(mine) / weigh(batch))
        part_loss.backward()
        value = part_loss.item()
    elif fsdp_enabled():
        (loss(batch[:1]) * 0).backward()  # the others wait for this process's part of the layers
    return all_reduce_sum(value)
