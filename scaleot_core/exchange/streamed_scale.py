"""The model owner's scale of models that memory doesn't hold: what `scale` measures, a layer at a time from disk."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scaleot_core.common.runtime import DTYPES
from scaleot_core.compression.emulator import meta_emulator
from scaleot_core.compression.quantization import QuantizedMatrix
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.quantized import SCALES
from scaleot_core.exchange.scale import MeasuredScale, change_of_logits, find_scale
from scaleot_core.models.forward import hooks
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.tuning.adapters import TunedAdapter, TunedLora


def measure_streamed_scale(
    model: StreamedModel, package: Package, adapter: TunedAdapter, fitted: TunedAdapter, blocks: Tensor
) -> MeasuredScale:
    """Do what `scale.measure_scale` does; `fitted` is the adapter at the real model's shapes.

    The model is read from disk up to five times, the package three times.
    """
    target = streamed_emulator_effect(package, adapter, blocks, model.device)
    return find_scale(_effect(model, partial(_plugged, model, fitted), blocks), target)


def streamed_emulator_effect(package: Package, adapter: TunedAdapter, blocks: Tensor, device: torch.device) -> float:
    """Measure the adapter's effect on the emulator that it was tuned in."""
    emulator = stream_emulator(package, device)
    return _effect(emulator, partial(_tuned, emulator, adapter), blocks)()


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
    """Make of a change of layers, given its scale, a function of that: the effect on the logits of blocks (N, T)."""

    def states(*scale: float) -> Tensor:
        return model.run(blocks, partial(change, scale), batch_blocks=1, states=True).float()

    head, before = model.read_head(), model.run(blocks, _untouched, batch_blocks=1, states=True).float()
    return lambda *scale: change_of_logits(states(*scale) - before, head)


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
