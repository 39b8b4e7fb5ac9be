"""Write and read safetensors files: whole or not at all, one tensor at a time, the same bytes for the same tensors."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from scaleot_core.common.distributed import full_tensor
from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import atomic_file, read_pieces
from scaleot_core.common.launch import is_main_process

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
}
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Names of tensors with their shapes and dtypes."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as one safetensors file, in sorted order so that equal tensors give equal bytes.

    Split ones are put together one at a time; all processes must take part, and the first writes.
    """
    with atomic_file(path) as temporary:
        writer = TensorWriter(temporary, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        for name in sorted(tensors):
            tensor = full_tensor(tensors[name].detach())
            if is_main_process():
                writer.write(name, tensor)


class TensorWriter:
    """A safetensors file that is written tensor by tensor, in any order; names, shapes and dtypes are known before.

    The same tensors give the same bytes in whatever order they come, and one at a time is in memory.
    """

    def __init__(self, path: Path, expected: Shapes) -> None:
        header: dict[str, dict[str, Any]] = {}
        at = 0
        for name in sorted(expected, key=lambda n: (-expected[n][1].itemsize, n)):  # so that all are aligned
            shape, dtype = expected[name]
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.expected, self.missing = expected, set(expected)
        self.start = {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
        self.path = path
        path.write_bytes(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor in its place; ValueError for one that wasn't announced so, or a second time."""
        if name not in self.missing or self.expected[name] != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(f"{self.path}: no tensor {name!r} of shape {tuple(tensor.shape)} is to be written")
        self.missing.remove(name)
        with self.path.open("r+b") as stream:
            stream.seek(self.start[name])
            stream.write(tensor_bytes(tensor))

    def check_whole(self) -> None:
        """Raise ValueError if a tensor wasn't written."""
        if self.missing:
            raise ValueError(f"{self.path}: tensor {min(self.missing)!r} was not written")


def copy_tensors(
    source: Path, target: Path, replace: Callable[[str], torch.Tensor | None], moved: Callable[[int], None]
) -> None:
    """Copy a sound safetensors file byte by byte, except for the tensors that `replace` gives others for.

    These have the same shapes and dtypes. One tensor at a time is in memory, and `moved` is told the bytes written.
    """
    with source.open("rb") as stream, target.open("wb") as out:
        size = stream.read(8)
        text = stream.read(int.from_bytes(size, "little"))
        out.write(size + text)
        moved(len(size + text))
        places = {name: place["data_offsets"] for name, place in json.loads(text).items() if name != "__metadata__"}
        for name, (start, end) in sorted(places.items(), key=lambda item: item[1]):
            tensor = replace(name)
            if tensor is not None:
                assert tensor.nbytes == end - start, name
                out.write(tensor_bytes(tensor))
                stream.seek(end - start, os.SEEK_CUR)
                moved(end - start)
            else:
                for piece in read_pieces(stream, moved, end - start):
                    out.write(piece)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Give a tensor's bytes as they lie in memory, or in that of a copy on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read a safetensors file, or its tensors whose names begin so; UserError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys() if name.startswith(prefix)}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a sound safetensors file ({one_line(error)}); make or fetch it again") from None


def tensor_hash(tensor: torch.Tensor) -> str:
    """Compute the hex SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
