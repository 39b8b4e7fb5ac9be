"""Files that appear whole or not at all, and tensors and JSON that are checked when they are read back."""

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from scaleot_core.errors import UserError, one_line
from scaleot_core.parallel import is_first, whole

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Names of tensors with their shapes and dtypes."""


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well and vanishes when it doesn't."""
    if not is_first():
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.replace(old)
        temporary.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it when the block ends well."""
    if not is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / target.name
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON with sorted keys; NaN and infinity are refused (ValueError)."""
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read one JSON file; UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}); make it again") from None


def once(file: Path, measure: Callable[[], Any]) -> Any:
    """What `measure` gives, as JSON in `file`: measured if the file isn't there yet, else read back."""
    if file.exists():
        return read_json(file)
    value = measure()
    write_json(file, value)
    return json.loads(json.dumps(value))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; UserError names the file and the line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({one_line(error)})") from None
    return [row for _, row in parse_jsonl(str(path), lines)]


def parse_jsonl(name: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number, from 1, and its JSON object, blank lines aside; UserError for a line that is none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{name}, line {number}: not valid JSON ({one_line(error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: a JSON object is needed, this is a {type(row).__name__}")
        yield number, row


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as one safetensors file, in sorted order so that equal tensors give equal bytes.

    Split ones are put together one at a time; all processes must take part, and the first writes.
    """
    with whole_file(path) as temporary:
        writer = TensorWriter(temporary, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        for name in sorted(tensors):
            tensor = whole(tensors[name].detach())
            if is_first():
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
        """Put a tensor in its place; ValueError for one that isn't as it was announced, or is there already."""
        if name not in self.missing or self.expected[name] != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(f"{self.path}: no tensor {name!r} of shape {tuple(tensor.shape)} is to be written")
        self.missing.remove(name)
        with self.path.open("r+b") as stream:
            stream.seek(self.start[name])
            stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def check_whole(self) -> None:
        """ValueError where a tensor wasn't written."""
        if self.missing:
            raise ValueError(f"{self.path}: tensor {min(self.missing)!r} was not written")


def read_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read a safetensors file, or its tensors whose names begin so; UserError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys() if name.startswith(prefix)}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a sound safetensors file ({one_line(error)}); make or fetch it again") from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_hash(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able values and, for a Path, of the content of that file or of all files in that folder."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for file in files:
                digest.update(f"{file.name}:{sha256(file)}\n".encode())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def folder_bytes(folder: Path, suffix: str) -> int:
    """Bytes of the files in a folder whose names end in `suffix`."""
    return sum(file.stat().st_size for file in folder.glob(f"*{suffix}"))
