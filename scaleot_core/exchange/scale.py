"""The model owner's scale: how strongly an adapter is plugged in, chosen on public text (method section 8).

What is tuned in an emulator changes the real model less, or more. The scale is that with which the change of the real
model's logits on public text is as large as that of the emulator's was.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.compression.plan import Plan
from scaleot_core.models.forward import last_hidden_state
from scaleot_core.tuning.adapters import TunedAdapter, plugged_in, tuned_emulator

LEAST, MOST = 0.5, 3.0  # scales that were tried (docs/results.md); outside nothing is known
CLOSE = 0.05  # relative difference of the effects that is near enough
STEPS = 4  # most measurements on the real model
BLOCKS, BLOCK_SIZE = 2, 256  # of public text


@dataclass(frozen=True)
class MeasuredScale:
    """A scale, and what it comes from: root mean squares of the changes of the logits."""

    scale: float
    emulator: float
    """Of the emulator's logits."""
    model: dict[float, float]
    """Of the real model's, by the scale that was tried."""


def check_scale(scale: float) -> float:
    """Give a scale back; UserError for one that is not finite or outside of what was measured."""
    if not LEAST <= scale <= MOST:
        raise UserError(f"--scale {scale}: the range is {LEAST} to {MOST}")
    return scale


@torch.no_grad()
def states(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Compute the last hidden states (N, T, D) of blocks (N, T), in float32."""
    return torch.cat([last_hidden_state(model, block).float() for block in blocks.split(1)])


@torch.no_grad()
def effect(
    model: PreTrainedModel, change: AbstractContextManager[None], blocks: Tensor, untuned: Tensor | None = None
) -> float:
    """Measure the root mean square change of a model's logits on blocks (N, T), over tokens and vocabulary.

    Logits as the head gives them, before a cap or a divisor, which would be the same for the emulator.
    `change` changes the model for the length of a block, but not its head; `untuned` are its `states` without it.
    """
    before = states(model, blocks) if untuned is None else untuned
    with change:
        moved = states(model, blocks) - before
    return change_of_logits(moved, model.get_output_embeddings().weight)


def change_of_logits(moved: Tensor, head: Tensor) -> float:
    """Compute the root mean square change of logits from that of last hidden states (N, T, D) and the head (V, D)."""
    squares = [float(nn.functional.linear(part.to(head.dtype), head).float().square().mean()) for part in moved]
    return math.sqrt(sum(squares) / len(squares))


def measure_scale(
    model: PreTrainedModel, plan: Plan, adapter: TunedAdapter, target: float, blocks: Tensor
) -> MeasuredScale:
    """Find the scale at which an adapter changes the real model's logits as much as `target`, the emulator's `effect`.

    As `find_scale` does.
    """
    before = states(model, blocks)
    return find_scale(lambda scale: effect(model, plugged_in(model, plan, adapter, scale), blocks, before), target)


def find_scale(effect_at: Callable[[float], float], target: float) -> MeasuredScale:
    """Find the scale at which the effect on the real model is as large as `target`, that on the emulator.

    Found by secants on the logarithms, from 1 on, within `LEAST` and `MOST`. UserError for an effect that isn't finite.
    """
    found: dict[float, float] = {}
    scale = 1.0
    while scale not in found and len(found) < STEPS:
        found[scale] = effect_at(scale)
        if not math.isfinite(found[scale]) or not math.isfinite(target):
            raise UserError("the adapter's effect on public text is not finite; it is of no use")
        if found[scale] == 0 or target == 0 or abs(found[scale] / target - 1) < CLOSE:
            break
        scale = min(MOST, max(LEAST, _next(found, target)))
    nearest = min(found, key=lambda tried: abs(found[tried] - target)) if target else 1.0
    return MeasuredScale(nearest, target, found)


def _next(found: dict[float, float], target: float) -> float:
    """Go where the line through the last two measurements meets the target, in logarithms; the first has slope 1."""
    (s, last), slope = list(found.items())[-1], 1.0
    if len(found) > 1:
        t, before = list(found.items())[-2]
        slope = math.log(last / before) / math.log(s / t)
    return s * (target / last) ** (1 / slope) if slope > 0 else s


def emulator_effect(emulator: PreTrainedModel, plan: Plan, adapter: TunedAdapter, blocks: Tensor) -> float:
    """Measure the adapter's `effect` on the emulator that it was tuned in."""
    return effect(emulator, tuned_emulator(emulator, plan, adapter), blocks)
