"""Several processes for one stage, as `accelerate launch` starts them: each takes its share of every batch.

All hold the model and draw the same batches; gradients are summed before each update, so that all keep the same
weights, and those of one process alone within float error. The first process writes; what the others would write is
dropped. Started plainly, one process is all there is and nothing here costs anything.
"""

import json
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

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
    """What the first process measures, as JSON has it, in all of them."""
    if size() == 1:
        return measure()
    text = json.dumps(measure()).encode() if is_first() else b""
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
    """Sum gradients over the processes, of those parameters that any of them has one for."""
    if size() == 1:
        return
    parameters = list(parameters)
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=_place())
    distributed.all_reduce(there)
    for parameter, count in zip(parameters, there.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


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
    return total(value)
