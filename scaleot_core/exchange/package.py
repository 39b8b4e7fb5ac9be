"""The emulator package: how it is written, checked and read back.

A folder of safetensors, the tokenizer's files and one manifest.json. It holds everything that the data owner needs, and
it is all that the data owner needs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import read_json
from scaleot_core.common.progress import Moved, byte_progress
from scaleot_core.common.runtime import DTYPES
from scaleot_core.common.tensors import Shapes, TensorWriter
from scaleot_core.compression.emulator import PARTS, assemble, meta_emulator, part_of, tensor_shapes
from scaleot_core.compression.plan import DECODER_KINDS, Cut, LayerKind, Plan
from scaleot_core.compression.quantization import dequantized, quantize
from scaleot_core.exchange.manifest import (
    MANIFEST,
    MOST_LAYERS,
    TOKENIZER_FILES,
    Manifest,
    manifest_sha256,
    read_checked,
    write_manifest,
)
from scaleot_core.exchange.quantized import FROZEN_PARTS, join_scales, stored_shapes, stored_tensors
from scaleot_core.exchange.shards import TENSOR_FILE, part_files
from scaleot_core.exchange.tokenizer import load_untrusted_tokenizer, save_tokenizer
from scaleot_core.exchange.untrusted import check_tensors, stream_untrusted_tensors
from scaleot_core.models.families import FAMILIES, family
from scaleot_core.models.forward import last_hidden_state
from scaleot_core.settings import AdapterKind, Fraction, Frozen, HarmonizerForm

FORMAT: Final = "scaleot-emulator"
FORMAT_VERSION: Final = 3
UNSTATED = "not stated: ask the model owner"
LONGEST_LICENSE = 1000  # characters
LARGEST_BUFFERS = 2**24  # numbers: those that a model computes for itself, as rotary frequencies

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Recovery = Annotated[dict[Label, float | None], Field(max_length=16)]


class PackageManifest(Manifest):
    """A package's manifest: what tuning needs to know, and no more."""

    format: Literal["scaleot-emulator"] = FORMAT
    format_version: Literal[3] = FORMAT_VERSION
    license: Annotated[str, Field(max_length=LONGEST_LICENSE)]
    """Under which the package is shipped."""
    architecture: dict[str, Any]
    """The model's configuration, as transformers has it."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of every tensor that `frozen` doesn't say otherwise of, and of all once they are read."""
    frozen: Annotated[Literal["int8"] | None, Field(exclude_if=lambda form: form is None)] = None
    """In what the matrices of harmonizers and compressed layers are shipped, where not in `dtype`."""
    layers: Annotated[tuple[LayerKind, ...], Field(min_length=1, max_length=MOST_LAYERS)]
    """What became of each decoder layer."""
    beta: Fraction
    """β, which says the ranks of the compressed layers."""
    harmonizer: HarmonizerForm
    like: Annotated[dict[int, int], Field(max_length=MOST_LAYERS, default_factory=dict)]
    """Whose weights each shared layer has."""
    cuts: Annotated[dict[int, Cut], Field(max_length=MOST_LAYERS, default_factory=dict)]
    """How far layers are cut that β doesn't cut."""
    figures: Annotated[dict[Label, dict[AdapterKind, Recovery]], Field(max_length=64, default_factory=dict)]
    """The model owner's own measured recovery, by task, adapters and metric, if it chose to tell."""


def save(
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    tensors: Iterable[tuple[str, Tensor]],
    license: str = UNSTATED,
    *,
    frozen: Literal["int8"] | None = None,
    **fields: Any,
) -> None:
    """Write an emulator as a package into an existing, empty folder, one tensor after the other.

    `config` is the model's, in the package's dtype; with `frozen` the frozen matrices are quantized. `fields` go into
    the manifest. ValueError for a tensor that is missing or doesn't belong there.
    """
    path = family(config).layers
    expected = stored_shapes(tensor_shapes(meta_emulator(config, plan, buffers_too=True), plan), frozen)
    files, writers = dict[str, TensorWriter](), list[TensorWriter]()
    for part, shapes in expected.items():
        for file, those in part_files(part, shapes).items():
            writers.append(TensorWriter(folder / file, those))
            files |= dict.fromkeys(those, writers[-1])
    for name, tensor in tensors:
        if name not in files:
            raise ValueError(f"tensor {name!r} of a {part_of(name, path, plan)} layer has no place in the package")
        for key, stored in stored_tensors(name, tensor, files[name].expected).items():
            files[key].write(key, stored)
    for writer in writers:
        writer.check_whole()
    save_tokenizer(folder, tokenizer)
    known = _config_fields(config.model_type)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "license": license,
        "architecture": {key: value for key, value in config.to_dict().items() if key in known},
        "dtype": str(config.dtype).removeprefix("torch."),
        "layers": list(plan.kinds),
        "beta": plan.beta,
        "harmonizer": plan.harmonizer.model_dump(),
        "like": {str(i): other for i, other in plan.like.items()},
        "cuts": {str(i): cut.model_dump(mode="json") for i, cut in plan.cuts.items()},
        **({"frozen": frozen} if frozen else {}),
        **fields,
    }
    write_manifest(folder, manifest)


def measured_recovery(metrics: Path, package: str) -> dict[str, Any]:
    """Read the recovery from a metrics.json, by task, adapters and metric; UserError where it is another package's."""
    found = read_json(metrics)
    try:
        if found["emulator"]["package"] != package:
            raise UserError(f"{metrics}: it was measured with another package than the one to ship; run `dvc repro`")
        return {
            task: {kind: figures["recovery"] for kind, figures in measured["adapters"].items()}
            for task, measured in found["tasks"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{metrics}: it is no metrics.json of this version; run `dvc repro`") from None


def _config_fields(model_type: str) -> set[str]:
    """What a configuration of an architecture may say: what transformers' own class has, but where it came from."""
    return set(AutoConfig.for_model(model_type).to_dict()) - {"_name_or_path"}


def _config(manifest: PackageManifest) -> PretrainedConfig:
    """The configuration that a manifest states: plain settings of a supported architecture and no others.

    What would make transformers fetch or run something, such as `auto_map`, `attn_implementation` or
    `quantization_config`, is none of them.
    """
    fields = dict(manifest.architecture)
    name = fields.pop("model_type", None)
    if name not in FAMILIES:
        raise ValueError(f"architecture {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    foreign = sorted(fields.keys() - _config_fields(name))
    if foreign:
        raise ValueError(f"`{foreign[0]}` is no setting of {name}")
    count = CONFIG_MAPPING[name].attribute_map.get("num_hidden_layers", "num_hidden_layers")
    stated = {fields.get(count), fields.get("num_hidden_layers", fields.get(count))}
    if stated != {len(manifest.layers)}:  # before a configuration of so many layers is made
        raise ValueError(f"`layers` has {len(manifest.layers)} kinds, the architecture {fields.get(count)!r}")
    return AutoConfig.for_model(name, **{**fields, "dtype": DTYPES[manifest.dtype]})


class Package:
    """A package in a folder, checked part by part as each is first asked for; UserError where a part isn't sound.

    `Package(folder)` itself reads the manifest and finds every file that it lists, those of tensors by their sizes
    alone: they are hashed as they are read, each time. With `links`, for the pipeline's own folders alone, files may be
    links, as DVC's are with `cache.type symlink`.
    """

    def __init__(self, folder: Path, *, links: bool = False) -> None:
        self.folder, self.links = folder, links
        self.manifest = read_checked(folder, PackageManifest, TOKENIZER_FILES, later=TENSOR_FILE, links=links)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the manifest, which identifies all that it lists."""
        return manifest_sha256(self.folder)

    @cached_property
    def plan(self) -> Plan:
        """The layer plan that the manifest states."""
        manifest = self.manifest
        with self._describing():
            if not set(manifest.layers) & set(DECODER_KINDS):
                raise ValueError("no decoder layer is left to tune")
            return Plan(manifest.layers, manifest.beta, manifest.harmonizer, manifest.like, manifest.cuts)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        with self._describing():
            return _config(self.manifest)

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The emulator without weights, to read names and shapes from. Of the files nothing but hashes was read."""
        plan, config = self.plan, self.config
        with self._describing():
            model = meta_emulator(config, plan, buffers_too=True)
            buffers = sum(buffer.numel() for buffer in model.buffers())
            if buffers > LARGEST_BUFFERS:
                raise ValueError(f"its buffers would have {buffers:,} numbers")
        return model

    @cached_property
    def expected(self) -> dict[str, dict[str, Shapes]]:
        """The files of each part, and the tensors that each file must have, by name, shape and dtype."""
        shapes = stored_shapes(tensor_shapes(self.meta_model, self.plan), self.manifest.frozen)
        parts = {part: part_files(part, those) for part, those in shapes.items()}
        wanted = {name for files in parts.values() for name in files}
        for name in sorted({name for name in self.manifest.files if TENSOR_FILE.fullmatch(name)} ^ wanted):
            what = "is missing" if name in wanted else "has no place among the files of its tensors"
            raise UserError(f"{self.folder}: {name!r} {what}; fetch it again")
        return parts

    def check(self) -> None:
        """Check every tensor, and every file by its hash; one tensor at a time is in memory."""
        for _ in self.stream(*PARTS):
            pass

    def stream(self, *parts: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of some parts in the package's dtype, one at a time, by their names in the model.

        All headers are checked before the first, and each file is hashed while it is read, once. Nothing may be used
        before the last: UserError comes at the end of a file whose content is not what the manifest says.
        """
        return ((name, dequantized(tensor)) for name, tensor in self._stream_as_shipped(*parts))

    def _stream_as_shipped(self, *parts: str) -> Iterator[tuple[str, Tensor]]:
        """`stream`, with a `QuantizedMatrix` for what is shipped as codes and scales."""
        files = {name: those for part in parts for name, those in self.expected.get(part, {}).items()}
        check_tensors({self.folder / name: those for name, those in files.items()})
        entries = self.manifest.files

        def stored(moved: Moved) -> Iterator[tuple[str, Tensor]]:
            for name, those in files.items():
                yield from stream_untrusted_tensors(self.folder / name, those, entries[name].sha256, moved)

        with byte_progress("reading the package", sum(entries[name].bytes for name in files)) as moved:
            yield from join_scales(stored(moved), DTYPES[self.manifest.dtype], self.folder)

    def tensors(self, *parts: str) -> dict[str, Tensor]:
        """Read the tensors of some parts in the package's dtype, by their names in the model; no other weights."""
        return dict(self.stream(*parts))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_untrusted_tokenizer(self.folder, links=self.links)

    def load(self, device: torch.device, frozen: Frozen | None = None) -> PreTrainedModel:
        """Load the emulator, frozen: built from the configuration and the plan, then filled with the tensors.

        With `frozen` the matrices of harmonizers and compressed layers stay quantized. It is run once, on two tokens.
        """
        path = family(self.config).layers

        def held(name: str, tensor: Tensor) -> Tensor:
            tensor = tensor.to(device)
            if not frozen or tensor.dim() != 2 or part_of(name, path, self.plan) not in FROZEN_PARTS:
                return dequantized(tensor)
            return quantize(tensor, frozen)

        tensors = {name: held(name, tensor) for name, tensor in self._stream_as_shipped(*PARTS)}
        model = assemble(self.config, self.plan, tensors.items(), device=device)
        try:
            with torch.no_grad():
                last_hidden_state(model, torch.zeros(1, 2, dtype=torch.long))
        except Exception as error:  # whatever settings that don't go together lead to
            raise UserError(
                f"{self.folder}/{MANIFEST}: its model doesn't run ({one_line(error)}); fetch it again"
            ) from error
        return model

    @contextmanager
    def _describing(self) -> Iterator[None]:
        """Turn whatever a manifest that makes no sense leads to into a UserError."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"{self.folder}/{MANIFEST}: it describes no model ({one_line(error)}); fetch it again"
            ) from error
