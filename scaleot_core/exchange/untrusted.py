"""Read JSON and tensors from the other party: bounded, of the expected shapes, finite; or raise UserError."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import refuse_duplicates
from scaleot_core.common.progress import Moved
from scaleot_core.common.tensors import SAFETENSORS_DTYPES, Shapes

LARGEST_JSON = 2**20  # bytes of a manifest, or of a header: those of the largest models have some 100 KB
LITTER = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")  # what operating systems leave in folders and archives


def is_litter(name: str) -> bool:
    """Tell whether a file, or a folder on the way to it, was left by an operating system."""
    return any(part in LITTER or part.startswith("._") for part in name.split("/"))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def read_untrusted_json(path: Path, *, links: bool = False) -> Any:
    """Read JSON from a plain file of bounded size; UserError for a link, a key twice, NaN or too deep a nesting."""
    if path.is_symlink() and not links:
        raise UserError(f"{path}: it is a link, which is not followed; name or send the file itself")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for it; {LARGEST_JSON:,} are the most")
    try:
        return _parse_strictly(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}); fetch it again") from None


def _parse_strictly(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates, parse_constant=_no_constant)


def check_tensors(files: Mapping[Path, Shapes]) -> None:
    """Raise UserError unless safetensors files have exactly the tensors expected, by name, shape and dtype.

    Only headers are read, in which safetensors refuses overlaps and gaps; no memory is taken.
    """
    for file, expected in files.items():
        with _refusing_damage(file), file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            if size > LARGEST_JSON:
                raise ValueError(f"a header of {size:,} bytes")
            _parse_strictly(content.read(size))
        with _refusing_damage(file), safe_open(file, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        announced = {name: (shape, SAFETENSORS_DTYPES[dtype]) for name, (shape, dtype) in expected.items()}
        for name in sorted(announced.keys() | stored.keys()):
            if stored.get(name) != announced.get(name):
                raise UserError(
                    f"{file}: tensor {name[:200]!r} is missing, foreign or of the wrong shape or dtype; fetch it again"
                )


def read_untrusted_tensors(files: Mapping[Path, Shapes]) -> dict[str, torch.Tensor]:
    """Read exactly the expected tensors of safetensors files; UserError for others, or numbers that are not finite."""
    check_tensors(files)
    tensors: dict[str, torch.Tensor] = {}
    for file, expected in files.items():
        with _refusing_damage(file), safe_open(file, framework="pt") as stream:
            for name in expected:
                tensors[name] = stream.get_tensor(name)
                if not tensors[name].isfinite().all():
                    raise UserError(f"{file}: tensor {name!r} has numbers that are not finite; it is of no use")
    return tensors


def check_hash(file: Path, actual: str, stated: str) -> None:
    """Raise UserError where a file's hash is not the one that its manifest states."""
    if actual != stated:
        raise UserError(f"{file}: the content is not what the manifest says; fetch it again")


def stream_untrusted_tensors(
    file: Path, expected: Shapes, sha256: str, moved: Moved
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a file that `check_tensors` has passed, one at a time, in the order of their bytes.

    The file is read once and hashed on the way, so nothing may be used before the end: there UserError comes for
    another SHA-256, or numbers that are not finite.
    """
    digest, not_finite = hashlib.sha256(), ""
    with _refusing_damage(file), file.open("rb") as stream:
        size = stream.read(8)
        text = stream.read(int.from_bytes(size, "little"))
        digest.update(size + text)
        moved(len(size + text))
        header = _parse_strictly(text)
        for name in sorted(expected, key=lambda name: (header[name]["data_offsets"], name)):
            shape, dtype = expected[name]
            tensor = torch.empty(shape, dtype=dtype)
            content = tensor.flatten().view(torch.uint8).numpy().data
            if stream.readinto(content) != math.prod(shape) * dtype.itemsize:
                raise ValueError("it is cut off")
            digest.update(content)
            moved(len(content))
            not_finite = not_finite or ("" if tensor.isfinite().all() else name)
            yield name, tensor
    check_hash(file, digest.hexdigest(), sha256)
    if not_finite:
        raise UserError(f"{file}: tensor {not_finite!r} has numbers that are not finite; it is of no use")


@contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a sound safetensors file ({one_line(error)}); fetch it again") from None
