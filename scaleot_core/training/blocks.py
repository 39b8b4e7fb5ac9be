"""Train parameters on corpus blocks: one loop for harmonizers, distillation and whoever attacks the package."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from scaleot_core.common.allocator import keep_freed_memory
from scaleot_core.common.kernels import choose_attention
from scaleot_core.common.random import generator
from scaleot_core.training import gradients
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import run_steps
from scaleot_core.training.optimizer import Optimizer, linear_warmup_decay

WARMUP = 0.1  # share of the steps until the peak rate


class BlockSettings(Protocol):
    """How long, on how much and how fast: `Dlr`, `Distill`, `Attack`."""

    @property
    def steps(self) -> int: ...

    @property
    def batch_blocks(self) -> int: ...

    @property
    def lr(self) -> float: ...


def draw_blocks(blocks: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Draw `count` of the blocks (N, T), with replacement."""
    return blocks[torch.randint(len(blocks), (count,), generator=draw)]


def update(
    optimizer: Optimizer, batch: Tensor, loss: Callable[[Tensor], Tensor], settings: BlockSettings, i: int
) -> dict[str, float]:
    """Take step i of `settings.steps` by the mean loss of a batch of blocks (B, T); return its figures."""
    value = gradients.backward(batch, loss)
    optimizer.step(settings.lr * linear_warmup_decay(i, settings.steps, WARMUP))
    return {"loss": value, "tokens": batch.numel()}


class BlockTrainer:
    """Trains parameters in place by the mean of `loss` over blocks (B, T) that are drawn anew at every step.

    `name` is that of the draws. The parameters need gradients from here on until the caller says otherwise.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        blocks: Tensor,
        loss: Callable[[Tensor], Tensor],
        settings: BlockSettings,
        *,
        seed: int,
        name: str,
        label: str,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        prepare(blocks, next(iter(parameters.values())).device)
        self.optimizer = Optimizer(parameters)
        self.blocks, self.loss, self.settings = blocks, loss, settings
        self.seed, self.name, self.label, self.checkpoint = seed, name, label, checkpoint

    def step(self, i: int) -> dict[str, float]:
        """Take step i."""
        batch = draw_blocks(self.blocks, self.settings.batch_blocks, generator(self.seed, self.name, i))
        return update(self.optimizer, batch, self.loss, self.settings, i)

    def run(self, until: int | None = None) -> list[dict[str, float]]:
        """Train from the last checkpoint up to step `until`, or to the end; return the figures of every step."""
        steps = self.settings.steps if until is None else until
        return run_steps(self.step, self.optimizer, label=self.label, steps=steps, checkpoint=self.checkpoint)


def prepare(blocks: Tensor, device: torch.device) -> None:
    """Set the allocator and the attention kernel to what is fast where all steps have the shape of these blocks."""
    keep_freed_memory()
    choose_attention(device, blocks.shape[1])
