"""What has left of a model: which of its weights a package has exactly, and all packages of the model together.

A *line* is the smallest part that is counted: a row of a matrix (out, in), a column of a down-projection, a number of
a bias or norm. Refitted columns and matrices at a lower rank are not exact, so they count as nothing.
"""

import math
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError
from torch import Tensor
from transformers import PretrainedConfig

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import fingerprint, read_json, write_json
from scaleot_core.compression.channels import channel_rows
from scaleot_core.compression.emulator import PARTS
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import family, fusion
from scaleot_core.models.streaming import StreamedModel

LEDGER = "ledger.private.json"  # in the model owner's project
Mask = Annotated[
    int,
    BeforeValidator(lambda mask: int(mask, 16) if isinstance(mask, str) else mask),
    PlainSerializer(hex),
]


class Lines(BaseModel):
    """The lines of one tensor that have left."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mask: Mask
    """A bit for each line, the lowest for the first."""
    size: int
    """Numbers in a line."""


class ExactWeights(BaseModel):
    """What one or more packages have exactly of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    model: str
    """The fingerprint of the model's weights."""
    weights: int
    """How many the model has."""
    tensors: dict[str, Lines]
    """By the tensor's name in the model."""

    @property
    def share(self) -> float:
        """The share of the model's weights."""
        return sum(lines.mask.bit_count() * lines.size for lines in self.tensors.values()) / self.weights

    def __or__(self, other: Self) -> "ExactWeights":
        """Return what both have together."""
        tensors = dict(self.tensors)
        for name, lines in other.tensors.items():
            mask = lines.mask | (tensors[name].mask if name in tensors else 0)
            tensors[name] = Lines(mask=mask, size=lines.size)
        return self.model_copy(update={"tensors": tensors})


def model_fingerprint(folder: Path) -> str:
    """Fingerprint the weights of the model in a folder."""
    return fingerprint(*sorted(folder.glob("*.safetensors")))


def model_tensor(name: str) -> tuple[str, int | None]:
    """Return the model's name of a package's tensor and, where it is one matrix of a fused projection, its number."""
    stem, _, part = name.partition(".parts.")
    number, _, last = part.partition(".")
    return (f"{stem}.{last}", int(number)) if part else (name, None)


def exact_weights(package: Package, model: StreamedModel, channels: Mapping[int, Tensor]) -> ExactWeights:
    """Compare a package's tensors bit for bit with the model's, of a pruned layer those of its kept `channels`."""
    config, names = model.model.config, family(model.model.config)
    tensors = dict[str, Lines]()
    for shipped_name, shipped in package.stream(*PARTS):
        name, part = model_tensor(shipped_name)
        if name not in model.names:  # a harmonizer's, or a factor
            continue
        stored = model.read(name).cpu()
        layer, _, inner = name.removeprefix(f"{names.layers}.").partition(".")
        is_inside, (module, _, kind) = name.startswith(f"{names.layers}."), inner.rpartition(".")
        matrix = stored.T if is_inside and names.transposed and stored.ndim == 2 else stored  # (out, in)
        axis = 1 if is_inside and module == names.feed_forward_out and kind == "weight" else 0
        lines, same = torch.arange(matrix.shape[axis]), stored
        if part is not None:
            lines = fusion(config, module.rpartition(".")[2]).rows(len(matrix))[part]
        elif shipped.shape != stored.shape and is_inside and int(layer) in channels:
            fused = names.feed_forward_in.get(module, 1)
            lines = channel_rows(channels[int(layer)], len(lines) // fused, fused)
        if part is not None or shipped.shape != stored.shape:
            same = matrix.index_select(axis, lines)
        if torch.equal(shipped, same):
            mask = sum(1 << line for line in lines.tolist()) | (tensors[name].mask if name in tensors else 0)
            tensors[name] = Lines(mask=mask, size=matrix.numel() // matrix.shape[axis])
    weights = sum(math.prod(model.places[name].shape) for name in model.names)
    return ExactWeights(model=model_fingerprint(model.folder), weights=weights, tensors=tensors)


def read_exact(file: Path) -> dict[str, ExactWeights]:
    """Read what packages have exactly, by package, from a package's private file or a ledger; UserError for neither."""
    data = read_json(file)
    try:
        records = {data["package"]: data["exact"]} if "exact" in data else data
        return {package: ExactWeights.model_validate(record) for package, record in records.items()}
    except (ValidationError, KeyError, AttributeError, TypeError, ValueError):
        raise UserError(
            f"{file}: it doesn't say what a package has exactly; name what `scaleot pack` of this version wrote"
        ) from None


def read_left(file: Path, model: str) -> ExactWeights | None:
    """Return what all packages that a file tells of have of a model, by its fingerprint; None where none is of it.

    Raises UserError for a file that isn't sound.
    """
    records = [record for record in read_exact(file).values() if record.model == model]
    return reduce(lambda left, right: left | right, records) if records else None


def enter(ledger: Path, package: str, exact: ExactWeights) -> None:
    """Write into a ledger what one more package has exactly."""
    records = (read_exact(ledger) if ledger.exists() else {}) | {package: exact}
    write_json(ledger, {name: record.model_dump() for name, record in records.items()}, private=True)


def channels_left(exact: ExactWeights, config: PretrainedConfig, count: int) -> dict[int, Tensor]:
    """Return which of its `count` feed-forward channels have left of each layer with all their rows, ascending."""
    names, channels, one_matrix = family(config), dict[int, Tensor](), (1 << count) - 1
    for i in range(config.num_hidden_layers):
        mask = one_matrix
        for into, fused in names.feed_forward_in.items():
            lines = exact.tensors.get(f"{names.layers}.{i}.{into}.weight")
            for k in range(fused):
                mask &= lines.mask >> k * count if lines else 0
        channels[i] = torch.tensor([channel for channel in range(count) if mask >> channel & 1], dtype=torch.long)
    return channels
