"""What the model owner finds in an adapter that came back, before it is plugged in."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import read_json
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange import adapter
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import family
from scaleot_core.settings import LoraForm
from scaleot_core.tuning.adapters import TunedAdapter, TunedLayers, TunedLora, fit_to_model


@dataclass(frozen=True)
class LayerChange:
    """How far one layer moved from what was shipped."""

    layer: int
    relative: float
    """Norm of the change over the norm of what was shipped, of all weights together that the adapter may change."""
    outlier: float
    """Largest change of one weight over the root mean square of all in its tensor, the largest of all tensors."""


def layer_changes(
    adapter: TunedAdapter, shipped: Mapping[str, Tensor], plan: Plan, config: PretrainedConfig
) -> list[LayerChange]:
    """Measure how far every tuned layer moved; `shipped` are the package's tensors."""
    prefix = f"{family(config).layers}."
    layers: dict[int, list[str]] = {}
    for name in adapter.factors if isinstance(adapter, TunedLora) else adapter.weights:
        layers.setdefault(int(name.removeprefix(prefix).partition(".")[0]), []).append(name)
    found = []
    for i, names in sorted(layers.items()):
        if isinstance(adapter, TunedLayers):
            pairs = ((shipped[name].double(), adapter.weights[name].double() - shipped[name]) for name in names)
            found.append(_layer_change(i, pairs))
        else:
            source = f"{prefix}{plan.like.get(i, i)}."
            before = (torch.cat(list(_matrices(shipped, name.replace(f"{prefix}{i}.", source, 1)))) for name in names)
            found.append(_layer_change(i, ((w, adapter.change(name)) for w, name in zip(before, names, strict=True))))
    return found


def _matrices(shipped: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """Yield the numbers of one matrix of the package, each part flat; of two factors those of their product."""
    for key in sorted(key for key in shipped if key.startswith(f"{name}.")):
        if key.endswith(".weight"):
            yield shipped[key].float().flatten()
        elif key.endswith(".left"):
            yield (shipped[key].float() @ shipped[f"{key.removesuffix('left')}right"].float()).flatten()


def _layer_change(layer: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> LayerChange:
    """Measure how far one layer moved, from its tensors as they were shipped, each with its change."""
    size = moved = outlier = 0.0
    for before, change in pairs:
        size, moved = size + float(before.double().square().sum()), moved + float(change.double().square().sum())
        if change.any():
            outlier = max(outlier, float(change.abs().max() / change.double().square().mean().sqrt()))
    return LayerChange(layer, math.sqrt(moved / size) if size else math.inf if moved else 0.0, outlier)


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that came back, found sound."""

    adapter: TunedAdapter
    layer_changes: list[LayerChange]

    @property
    def form(self) -> LoraForm | None:
        """Give LoRA's form, None for whole layers."""
        return self.adapter.form if isinstance(self.adapter, TunedLora) else None


def check_adapter(folder: Path, package: Package) -> CheckedAdapter:
    """Check an adapter against the package that was shipped; UserError where either is not sound."""
    tuned = adapter.read(folder, package)
    shipped = package.tensors("adapter", "compressed") if isinstance(tuned, TunedLora) else package.tensors("adapter")
    return CheckedAdapter(tuned, layer_changes(tuned, shipped, package.plan, package.config))


def check_base(base: str, model: PreTrainedModel, package: Package) -> None:
    """Raise UserError unless a model has, in the package's dtype, everything that the package has exactly."""
    here = model.state_dict()
    for name, tensor in package.exact.items():
        if name not in here or not torch.equal(here[name].to(tensor.device, tensor.dtype), tensor):
            raise UserError(f"{base}: its {name!r} is not that of the package, which was made from another model")


def fitted(tuned: TunedAdapter, package: Package, model: PreTrainedModel, private: Path) -> TunedAdapter:
    """Give an adapter the shapes of the real model; `private` is what `scaleot pack` wrote beside the package.

    That is read only where LoRA lies on feed-forward channels of which the package has some alone. UserError where it
    doesn't help.
    """
    if not isinstance(tuned, TunedLora):
        return tuned
    pruned = tuned.form.modules == "all" and bool(package.plan.cuts)
    return fit_to_model(tuned, model, kept_channels(private, package.sha256) if pruned else {})


def kept_channels(private: Path, package: str) -> dict[int, Tensor]:
    """Read which feed-forward channels a package has of each pruned layer from its owner's private file.

    UserError for a missing file, another package's, or one that doesn't say it.
    """
    if not private.is_file():
        raise UserError(
            f"{private}: no such file; the adapter lies on some of the feed-forward channels, and only what "
            "`scaleot pack` wrote beside the package says which: name that file with --private"
        )
    known = read_json(private)
    if not isinstance(known, dict) or known.get("package") != package:
        raise UserError(f"{private}: it belongs to another package than {package[:12]}…; name the right one")
    try:
        return {int(i): torch.tensor(kept, dtype=torch.long) for i, kept in known["channels"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{private}: it doesn't say which channels were kept ({one_line(error)})") from None
