"""The emulator package: how it is written, checked and read back.

A folder of safetensors, the tokenizer's files and one manifest.json: all that the data owner needs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.progress import Moved, byte_progress
from scaleot_core.common.runtime import DTYPES
from scaleot_core.common.tensors import Shapes, TensorWriter
from scaleot_core.compression.emulator import PARTS, assemble, meta_emulator, part_of, tensor_shapes
from scaleot_core.compression.plan import Plan, check_plan
from scaleot_core.compression.quantization import dequantized, quantize
from scaleot_core.exchange.description import (
    FORMAT,
    FORMAT_VERSION,
    UNSTATED,
    PackageManifest,
    config_fields,
    stated_config,
)
from scaleot_core.exchange.int8 import QUANTIZED_PARTS, join_scales, stored_shapes, stored_tensors
from scaleot_core.exchange.manifest import (
    MANIFEST,
    TOKENIZER_FILES,
    manifest_sha256,
    read_checked,
    write_manifest,
)
from scaleot_core.exchange.shards import TENSOR_FILE, part_files
from scaleot_core.exchange.suspicions import random_tokens
from scaleot_core.exchange.tokenizer import load_listed_tokenizer, save_tokenizer
from scaleot_core.exchange.untrusted import check_tensors, stream_untrusted_tensors
from scaleot_core.models.families import family
from scaleot_core.models.forward import last_hidden_state
from scaleot_core.settings import Quantization

LARGEST_BUFFERS = 2**24  # numbers: those that a model computes for itself, as rotary frequencies


def save(
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    tensors: Iterable[tuple[str, Tensor]],
    license: str = UNSTATED,
    *,
    quantized: Literal["int8"] | None = None,
    **fields: Any,
) -> None:
    """Write an emulator as a package into an existing, empty folder, one tensor after the other.

    `config` is the model's, in the package's dtype; with `quantized` the matrices of harmonizers and compressed layers
    are quantized. `fields` go into the manifest. ValueError for a tensor that is missing or doesn't belong there.
    """
    path = family(config).layers
    expected = stored_shapes(tensor_shapes(meta_emulator(config, plan, buffers_too=True), plan), quantized)
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
    stated = config_fields(config.model_type)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "license": license,
        "architecture": {key: value for key, value in config.to_dict().items() if key in stated},
        "dtype": str(config.dtype).removeprefix("torch."),
        "layers": [layer.model_dump(mode="json") for layer in plan],
        **({"quantized": quantized} if quantized else {}),
        **fields,
    }
    write_manifest(folder, manifest)


class Package:
    """A package in a folder, checked part by part as each is first asked for; UserError where a part isn't sound.

    `Package(folder)` reads the manifest and checks every file that it lists; files of tensors by their size alone,
    since they are hashed whenever they are read. With `links`, for the pipeline's own folders, files may be links, as
    DVC's are with `cache.type symlink`.
    """

    def __init__(self, folder: Path, *, links: bool = False) -> None:
        self.folder = folder
        self.manifest = read_checked(folder, PackageManifest, TOKENIZER_FILES, later=TENSOR_FILE, links=links)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the manifest, which identifies all that it lists."""
        return manifest_sha256(self.folder)

    @cached_property
    def plan(self) -> Plan:
        """The layer plan that the manifest states."""
        with self._describing():
            check_plan(self.manifest.layers)
        return self.manifest.layers

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        with self._describing():
            return stated_config(self.manifest)

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The emulator without weights, to read names and shapes from; built from the manifest alone."""
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
        shapes = stored_shapes(tensor_shapes(self.meta_model, self.plan), self.manifest.quantized)
        parts = {part: part_files(part, those) for part, those in shapes.items()}
        needed = {name for files in parts.values() for name in files}
        for name in sorted({name for name in self.manifest.files if TENSOR_FILE.fullmatch(name)} ^ needed):
            what = "is missing" if name in needed else "has no place among the files of its tensors"
            raise UserError(f"{self.folder}: {name!r} {what}; fetch it again")
        return parts

    def check(self) -> None:
        """Check every tensor, and every file by its hash; one tensor at a time is in memory."""
        for _ in self.stream(*PARTS):
            pass

    def stream(self, *parts: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of some parts in the package's dtype, one at a time, by their names in the model.

        All headers are checked before the first. Each file is read once and hashed on the way, so nothing may be used
        before the last: UserError comes at the end of a file whose content is not what the manifest says.
        """
        return ((name, dequantized(tensor)) for name, tensor in self._stream_as_shipped(*parts))

    def _stream_as_shipped(self, *parts: str) -> Iterator[tuple[str, Tensor]]:
        """Yield as `stream`, with a `QuantizedMatrix` for what is shipped as codes and scales."""
        files = {name: those for part in parts for name, those in self.expected.get(part, {}).items()}
        check_tensors({self.folder / name: those for name, those in files.items()})
        entries = self.manifest.files

        def stored(moved: Moved) -> Iterator[tuple[str, Tensor]]:
            for name, those in files.items():
                yield from stream_untrusted_tensors(self.folder / name, those, entries[name].sha256, moved)

        with byte_progress("reading the package", sum(entries[name].bytes for name in files)) as moved:
            yield from join_scales(stored(moved), DTYPES[self.manifest.dtype], self.folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_listed_tokenizer(self.folder, self.manifest.files)

    def load(self, device: torch.device, quantization: Quantization | None = None) -> PreTrainedModel:
        """Load the emulator, frozen: built from the configuration and the plan, then filled with the tensors.

        With `quantization` the matrices of harmonizers and compressed layers stay quantized. The model is run once, on
        two tokens. UserError where it doesn't run.
        """
        path = family(self.config).layers

        def held(name: str, tensor: Tensor) -> Tensor:
            tensor = tensor.to(device)
            if not quantization or tensor.dim() != 2 or part_of(name, path, self.plan) not in QUANTIZED_PARTS:
                return dequantized(tensor)
            return quantize(tensor, quantization)

        tensors = {name: held(name, tensor) for name, tensor in self._stream_as_shipped(*PARTS)}
        model = assemble(self.config, self.plan, tensors.items(), device=device)
        try:
            with torch.no_grad():
                last_hidden_state(model, random_tokens(model.config, (1, 2), torch.Generator().manual_seed(0)))
        except Exception as error:  # whatever settings that don't go together lead to
            raise UserError(
                f"{self.folder}/{MANIFEST}: its model doesn't run ({one_line(error)}); fetch it again"
            ) from error
        return model

    @contextmanager
    def _describing(self) -> Iterator[None]:
        """Turn any error into a UserError: a manifest that makes no sense may lead to all kinds."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"{self.folder}/{MANIFEST}: it describes no model ({one_line(error)}); fetch it again"
            ) from error
