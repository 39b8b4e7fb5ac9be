"""The model owner's scale: how strongly an adapter is plugged in, chosen on public text (method section 8).

What is tuned in an emulator changes the real model less, or more. The scale is that with which the change of the real
model's logits on public text is as large as that of the emulator's was. Both are read from disk a layer at a time.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scaleot_core.common.errors import UserError
from scaleot_core.common.runtime import DTYPES
from scaleot_core.compression.emulator import meta_emulator
from scaleot_core.compression.quantization import QuantizedMatrix
from scaleot_core.exchange.int8 import SCALES
from scaleot_core.exchange.package import Package
from scaleot_core.models.forward import hooks
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.tuning.adapters import TunedAdapter, TunedLora

LEAST, MOST = 0.5, 3.0  # scales that were tried (docs/log.md); outside nothing is known
CLOSE = 0.05  # relative difference of the effects that is near enough
STEPS = 4  # most measurements on the real model
FAR = math.log(MOST / LEAST)  # further than that, in logarithms, no next scale need be
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


def measure_scale(
    model: StreamedModel, package: Package, adapter: TunedAdapter, fitted: TunedAdapter, blocks: Tensor
) -> MeasuredScale:
    """Find the scale at which an adapter's effect on the real model is as large as it is on the emulator.

    `fitted` is the adapter at the real model's shapes. Blocks (N, T) are of public text. The model is read from disk up
    to five times, the package three times. UserError for an effect that isn't finite.
    """
    target = emulator_effect(package, adapter, blocks, model.device)
    return find_scale(_effect(model, partial(_plugged, model, fitted), blocks), target)


def emulator_effect(package: Package, adapter: TunedAdapter, blocks: Tensor, device: torch.device) -> float:
    """Measure the adapter's effect on the emulator that it was tuned in."""
    emulator = stream_emulator(package, device)
    return _effect(emulator, partial(_tuned, emulator, adapter), blocks)()


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
    if slope <= 0:
        return s
    return s * math.exp(max(-FAR, min(FAR, math.log(target / last) / slope)))


class StreamedEmulator(StreamedModel):
    """A package's emulator, read part by part, codes and scales as the matrices that they stand for."""

    def read(self, name: str) -> Tensor:
        """Read one tensor as a copy, in the package's dtype; that has room for every code."""
        tensor, place = super().read(name), self.places.get(f"{name}{SCALES}")
        if place is None:
            return tensor
        with safe_open(place.file, framework="pt") as stream:
            scales = stream.get_tensor(place.name).to(self.device)
        return QuantizedMatrix(tensor.to(torch.int8), scales, tensor.shape, self.dtype).dequantized()


def stream_emulator(package: Package, device: torch.device) -> StreamedModel:
    """Open a package's emulator to be read layer by layer; UserError where its tensors are not sound."""
    package.check()
    config, plan = package.config, package.plan
    files = [package.folder / name for names in package.expected.values() for name in names]
    empty = meta_emulator(config, plan, buffers_too=False)
    dtype = DTYPES[package.manifest.dtype]
    emulator = StreamedEmulator(package.folder, config, device=device, dtype=dtype, files=files, model=empty)
    for i, other in plan.like.items():
        own = f"{emulator.path}.{other}."
        same = {name.removeprefix(own): place for name, place in emulator.places.items() if name.startswith(own)}
        emulator.places |= {f"{emulator.path}.{i}.{name}": place for name, place in same.items()}
    return emulator


def _effect(
    model: StreamedModel, change: Callable[..., AbstractContextManager[None]], blocks: Tensor
) -> Callable[..., float]:
    """Make of a change of layers, given its scale, a function of that: the effect on the logits of blocks (N, T).

    It is the root mean square change over tokens and vocabulary, of logits as the head gives them, before a cap or a
    divisor, which would be the same for the emulator.
    """

    def states(*scale: float) -> Tensor:
        return model.run(blocks, partial(change, scale), batch_blocks=1, states=True).float()

    head, before = model.read_head(), model.run(blocks, _untouched, batch_blocks=1, states=True).float()
    return lambda *scale: change_of_logits(states(*scale) - before, head)


def change_of_logits(moved: Tensor, head: Tensor) -> float:
    """Compute the root mean square change of logits from that of last hidden states (N, T, D) and the head (V, D)."""
    squares = [float(nn.functional.linear(part.to(head.dtype), head).float().square().mean()) for part in moved]
    return math.sqrt(sum(squares) / len(squares))


@contextmanager
def _untouched(index: int, layer: nn.Module) -> Iterator[None]:
    yield


@contextmanager
def _plugged(
    model: StreamedModel, adapter: TunedAdapter, scale: tuple[float, ...], index: int, layer: nn.Module
) -> Iterator[None]:
    """Plug an adapter into one layer, whose weights are dropped behind it."""
    prefix = f"{model.path}.{index}."
    for name in adapter.changes:
        if name.startswith(prefix):
            weight = layer.get_parameter(name.removeprefix(prefix))
            weight.copy_(adapter.plugged(name, weight, *scale))
    yield


@contextmanager
def _tuned(
    emulator: StreamedModel, adapter: TunedAdapter, scale: tuple[float, ...], index: int, layer: nn.Module
) -> Iterator[None]:
    """Have in one layer of the emulator what was tuned in it; LoRA beside the matrices, as it was tuned."""
    if not isinstance(adapter, TunedLora):
        with _plugged(emulator, adapter, scale, index, layer):
            yield
        return
    prefix, strength = f"{emulator.path}.{index}.", adapter.form.alpha / adapter.form.rank

    def beside(factors: tuple[Tensor, Tensor], module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        a, b = (factor.to(out.device) for factor in factors)
        return out + strength * nn.functional.linear(nn.functional.linear(inputs[0], a), b)

    own = {name.removeprefix(prefix): f for name, f in adapter.factors.items() if name.startswith(prefix)}
    with hooks(*(layer.get_submodule(n).register_forward_hook(partial(beside, f)) for n, f in own.items())):
        yield
