"""Check an adapter that came back before it is plugged in: how far it moved, and whose model it is for."""

import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import read_json
from scaleot_core.compression.plan import Plan, shared_layers
from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import family
from scaleot_core.models.tokenizers import tokenizer_difference
from scaleot_core.settings import AdapterLimits, LoraForm
from scaleot_core.tuning.adapters import TunedAdapter, TunedLayers, TunedLora, fit_to_model

LEAST_VECTOR = 0.1  # of the layer's root mean square weight: a vector below it is next to nothing


@dataclass(frozen=True)
class LayerChange:
    """How far one layer moved from what was shipped."""

    layer: int
    relative: float
    """Norm of the change over the norm of what was shipped, over all weights that the adapter may change."""
    tensor: float
    """The same of the tensor that moved furthest; a vector of next to nothing is taken to be of the usual size."""
    outlier: float
    """Largest ratio, over tensors, of the largest change of a weight to the root mean square change."""


def layer_changes(
    adapter: TunedAdapter, shipped: Iterable[tuple[str, Tensor]], plan: Plan, config: PretrainedConfig
) -> list[LayerChange]:
    """Measure how far every tuned layer moved from the package's tensors, `shipped`; one at a time is in memory."""
    prefix = f"{family(config).layers}."
    layers: dict[int, dict[str, _Moved]] = {}  # by layer, each tensor that the adapter changes
    if isinstance(adapter, TunedLayers):
        for name, tensor in shipped:
            if name in adapter.weights:
                moved = layers.setdefault(_layer_of(name, prefix), {}).setdefault(name, _Moved())
                moved.add_shipped(tensor)
                tuned = adapter.weights[name]
                moved.add_change(a.double() - b for a, b in zip(_pieces(tuned), _pieces(tensor), strict=True))
    else:
        matrices: dict[str, list[_Moved]] = {}  # by their names in the package, where shared layers have one
        for name in adapter.factors:
            i = _layer_of(name, prefix)
            moved = layers.setdefault(i, {}).setdefault(name, _Moved())
            moved.add_change(_pieces(adapter.change(name)))
            shipped_name = name.replace(f"{prefix}{i}.", f"{prefix}{shared_layers(plan).get(i, i)}.", 1)
            matrices.setdefault(shipped_name, []).append(moved)
        for name, numbers in _numbers(shipped, matrices):
            for moved in matrices[name]:
                moved.add_shipped(numbers)
    return [_layer_change(i, list(layers[i].values())) for i in sorted(layers)]


def check_limits(adapter: Path, changes: Iterable[LayerChange], limits: AdapterLimits) -> None:
    """Raise UserError for the first layer that moved further than the model owner wants."""
    for change in changes:
        for what, limit, value in (
            ("change", limits.max_change, change.relative),
            ("tensor change", limits.max_tensor_change, change.tensor),
            ("outlier", limits.max_outlier, change.outlier),
        ):
            if not value <= limit:
                raise UserError(
                    f"{adapter}: layer {change.layer} has {what} {value:.3g}, the limit is {limit:g}; look at "
                    f"`scaleot check`, then ask for another or raise --max-{what.replace(' ', '-')}"
                )


def _layer_of(name: str, prefix: str) -> int:
    return int(name.removeprefix(prefix).partition(".")[0])


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor's numbers, so that making them float64 takes little memory."""
    return tensor.flatten().split(2**22)


def _numbers(shipped: Iterable[tuple[str, Tensor]], matrices: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, numbers) of the matrices among tensors: a weight, or a part of one; of two factors their product."""
    halves: dict[str, Tensor] = {}
    for key, tensor in shipped:
        module, _, kind = key.rpartition(".")
        name = module
        while name and name not in matrices:
            name = name.rpartition(".")[0]
        if name and kind == "weight":
            yield name, tensor
        elif name and kind in ("left", "right"):
            other = halves.pop(module, None)
            if other is None:
                halves[module] = tensor
            else:
                left, right = (tensor, other) if kind == "left" else (other, tensor)
                yield name, left.float() @ right.float()


class _Moved:
    """Sums over one tensor: its numbers, squares as it was shipped, squares of the change and the change's outlier."""

    def __init__(self) -> None:
        self.shipped = self.change = self.outlier = 0.0
        self.count, self.is_vector = 0, False

    def add_shipped(self, numbers: Tensor) -> None:
        """Add the tensor, or a part of it, as it was shipped."""
        self.shipped += sum(float(piece.double().square().sum()) for piece in _pieces(numbers))
        self.count += numbers.numel()
        self.is_vector = numbers.ndim < 2

    def add_change(self, pieces: Iterable[Tensor]) -> None:
        """Add the tensor's change, in pieces."""
        most = count = 0.0
        for piece in pieces:
            self.change += float(piece.double().square().sum())
            most, count = max(most, float(piece.abs().max())), count + piece.numel()
        if most:
            self.outlier = most / math.sqrt(self.change / count)


def _layer_change(layer: int, tensors: list[_Moved]) -> LayerChange:
    shipped, change = sum(tensor.shipped for tensor in tensors), sum(tensor.change for tensor in tensors)
    square = shipped / max(1, sum(tensor.count for tensor in tensors))
    furthest = 0.0
    for tensor in tensors:
        usual = square * tensor.count
        is_bare = tensor.is_vector and tensor.shipped < LEAST_VECTOR**2 * usual  # a bias of zeros may move
        furthest = max(furthest, _relative(tensor.change, usual if is_bare else tensor.shipped))
    return LayerChange(layer, _relative(change, shipped), furthest, max(tensor.outlier for tensor in tensors))


def _relative(change: float, shipped: float) -> float:
    """Divide two norms, given as squares."""
    return math.sqrt(change / shipped) if shipped else math.inf if change else 0.0


@dataclass(frozen=True)
class CheckedAdapter:
    """A sound adapter that came back."""

    adapter: TunedAdapter
    layer_changes: list[LayerChange]

    @property
    def form(self) -> LoraForm | None:
        """LoRA's form; None for whole layers."""
        return self.adapter.form if isinstance(self.adapter, TunedLora) else None


def check_adapter(folder: Path, package: Package) -> CheckedAdapter:
    """Check an adapter against the package that was shipped; UserError where either is not sound."""
    tuned = adapter_folder.read(folder, package)
    shipped = package.stream("adapter", *(["compressed"] if isinstance(tuned, TunedLora) else []))
    return CheckedAdapter(tuned, layer_changes(tuned, shipped, package.plan, package.config))


def check_base(base: str, read: Callable[[str], Tensor | None], package: Package) -> None:
    """Raise UserError unless a model has, in the package's dtype, all tensors that the package ships unchanged.

    `read` returns a tensor of the model by its name, or None; one at a time is in memory.
    """
    different = ""
    for name, shipped in package.stream("base", "adapter"):  # to the end, where a damaged package is found
        real = read(name)
        if not different and (real is None or not torch.equal(real.to(shipped.device, shipped.dtype), shipped)):
            different = name
    if different:
        raise UserError(f"{base}: its {different!r} is not that of the package, which was made from another model")


def tokenizer_change(tokenizer: PreTrainedTokenizerBase, package: Package) -> str:
    """Say in what the real model's tokenizer, or its chat template, isn't the package's; empty for in nothing."""
    return tokenizer_difference(package.tokenizer(), tokenizer)


def fitted(tuned: TunedAdapter, package: Package, model: PreTrainedModel, private: Path) -> TunedAdapter:
    """Give an adapter the shapes of the real model.

    `private` is the file that `scaleot pack` wrote beside the package; it is read only where LoRA lies on pruned
    channels. UserError where it is missing or doesn't fit.
    """
    if not isinstance(tuned, TunedLora):
        return tuned
    pruned = tuned.form.modules == "all" and any(layer.channels for layer in package.plan)
    return fit_to_model(tuned, model, kept_channels(private, package.sha256) if pruned else {})


def kept_channels(private: Path, package: str) -> dict[int, Tensor]:
    """Read from the owner's private file which feed-forward channels each pruned layer of a package has.

    UserError for a missing file, another package's, or one that doesn't say it.
    """
    if not private.is_file():
        raise UserError(
            f"{private}: no such file; the adapter lies on some of the feed-forward channels, and only what "
            "`scaleot pack` wrote beside the package says which: name that file with --private"
        )
    content = read_json(private)
    if not isinstance(content, dict) or content.get("package") != package:
        raise UserError(f"{private}: it belongs to another package than {package[:12]}…; name the right one")
    try:
        return {int(i): torch.tensor(kept, dtype=torch.long) for i, kept in content["channels"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{private}: it doesn't say which channels were kept ({one_line(error)})") from None
