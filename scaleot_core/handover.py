"""What crosses between the two parties: a folder, or one archive of it, with a manifest that is checked before use.

Everything that comes from the other side is hostile until it was checked: only listed files of known names, no links,
no pickle, JSON within bounds, hashes before content, shapes before memory, finite numbers. A refusal is a UserError.
"""

import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from scaleot_core.errors import UserError, one_line, printable
from scaleot_core.files import SAFETENSORS_DTYPES, Shapes, sha256, whole_file, whole_folder, write_json

MANIFEST = "manifest.json"
LARGEST_JSON = 2**20  # bytes of a manifest, or of a header: those of the largest models have some 100 KB
LARGEST_TOKENIZER = 2**26  # bytes of one of the tokenizer's files
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LARGEST_ARCHIVE = 17  # members: sixteen files and the manifest

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """A file as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Hash


class Manifest(BaseModel):
    """What every manifest has; a subclass is one format."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    format: str
    """Which format this is."""
    format_version: int
    """Its version."""
    files: Annotated[dict[str, Entry], Field(max_length=16)]
    """Every file beside the manifest."""


M = TypeVar("M", bound=Manifest)


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest, with all other files in it listed."""
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {**manifest, "files": files})


def copy(source: Path, folder: Path, manifest: Manifest, **changes: Any) -> None:
    """Copy what a checked manifest lists into an empty folder, with some of the manifest's own fields changed."""
    for name in manifest.files:
        shutil.copyfile(source / name, folder / name)
    fields = manifest.model_dump(mode="json", exclude={"files"})
    write(folder, {**fields, **changes})


def identity(folder: Path) -> str:
    """The SHA-256 of a folder's manifest, which stands for all that it lists."""
    return sha256(folder / MANIFEST)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def read_untrusted_json(path: Path) -> Any:
    """JSON from the other party: a plain file of bounded size, no key twice, no NaN, nothing nested beyond reason."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: no such file, or not a plain one")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for it; {LARGEST_JSON:,} are the most")
    try:
        return _strict(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}); fetch it again") from None


def _strict(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def format_of(folder: Path) -> str:
    """The format that a folder's manifest names, of the two that there are or not; UserError for no manifest."""
    data = read_untrusted_json(folder / MANIFEST)
    return str(data.get("format")) if isinstance(data, dict) else ""


def read(folder: Path, kind: type[M], names: Iterable[str]) -> M:
    """The manifest of a folder, after every file that it lists was found whole; UserError otherwise.

    `names` are those that files may have. Nothing of a file but its hash is read here.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    data = read_untrusted_json(folder / MANIFEST)
    expected = {key: kind.model_fields[key].default for key in ("format", "format_version")}
    if not isinstance(data, dict) or data.get("format") != expected["format"]:
        raise UserError(f"{folder}: not a {expected['format']} folder ({MANIFEST} names another format)")
    if data.get("format_version") != expected["format_version"]:
        raise UserError(f"{folder}: version {data.get('format_version')!r}; this reads {expected['format_version']}")
    try:
        manifest = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = printable(".".join(map(str, first["loc"])))[:200]
        reason = one_line(ValueError(first["msg"]))
        raise UserError(f"{folder}/{MANIFEST}: {where}: {reason}; fetch it again") from None
    there = {file.name: file.is_file() and not file.is_symlink() for file in folder.iterdir()}
    for name in sorted({*manifest.files, MANIFEST} | there.keys()):
        if name not in (*names, MANIFEST) or not there.get(name, True):
            raise UserError(f"{folder}: {name!r} is no file of this format; fetch it again")
        if name not in there:
            raise UserError(f"{folder}: {name!r} is missing; fetch it again")
        if name not in (*manifest.files, MANIFEST):
            raise UserError(f"{folder}: {name!r} is not listed in the manifest; fetch it again")
    for name, entry in manifest.files.items():
        if name in TOKENIZER_FILES and entry.bytes > LARGEST_TOKENIZER:
            raise UserError(f"{folder}: {name!r} has more than {LARGEST_TOKENIZER:,} bytes")
        file = folder / name
        if file.stat().st_size != entry.bytes or sha256(file) != entry.sha256:
            raise UserError(f"{file}: the content is not what the manifest says; fetch it again")
    return manifest


def check_tensors(files: Mapping[Path, Shapes]) -> None:
    """UserError unless some safetensors files have exactly the tensors expected, by name, shape and dtype.

    Their headers alone are read, which safetensors holds to be free of overlaps and gaps; no memory is taken.
    """
    for file, expected in files.items():
        with _sound(file), file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            if size > LARGEST_JSON:
                raise ValueError(f"a header of {size:,} bytes")
            _strict(content.read(size))
        with _sound(file), safe_open(file, framework="pt") as stream:
            given = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            for name in sorted(expected.keys() | given.keys()):
                there, (shape, dtype) = given.get(name), expected.get(name, ((), torch.float32))
                if (
                    name not in expected
                    or there is None
                    or tuple(there.get_shape()) != shape
                    or there.get_dtype() != SAFETENSORS_DTYPES[dtype]
                ):
                    raise UserError(
                        f"{file}: tensor {name[:200]!r} is missing, foreign or of the wrong shape or dtype; "
                        "fetch it again"
                    )


def read_tensors(files: Mapping[Path, Shapes]) -> dict[str, torch.Tensor]:
    """The tensors of some safetensors files: exactly those expected, all numbers finite; UserError names one else."""
    check_tensors(files)
    found: dict[str, torch.Tensor] = {}
    for file, expected in files.items():
        with _sound(file), safe_open(file, framework="pt") as stream:
            for name in expected:
                found[name] = stream.get_tensor(name)
                if not found[name].isfinite().all():
                    raise UserError(f"{file}: tensor {name!r} has numbers that are not finite; it is of no use")
    return found


@contextmanager
def _sound(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a sound safetensors file ({one_line(error)}); fetch it again") from None


def archive(folder: Path, target: Path) -> None:
    """Put a folder's files into one uncompressed zip; the same folder gives the same bytes."""
    with whole_file(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as made:
        for file in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(file.name)  # of a fixed date
            with file.open("rb") as stream, made.open(entry, "w", force_zip64=True) as out:
                shutil.copyfileobj(stream, out, 2**20)


def check_new(out: Path) -> None:
    """UserError where something is there already."""
    if out.exists():
        raise UserError(f"{out}: it is there already; name another, or delete it")


@contextmanager
def new(out: Path) -> Iterator[Path]:
    """A folder to fill, that becomes `out`, as it is or as a zip by its name, when the block ends well.

    UserError where `out` is there already.
    """
    check_new(out)
    if out.suffix != ".zip":
        with whole_folder(out) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="scaleot-") as name:
        yield Path(name)
        archive(Path(name), out)


def _check_directory(path: Path) -> None:
    """ValueError where an archive's own end names a directory that no archive of ours has: reading it takes memory."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 2**16 - 22))
        end = stream.read()
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) - at < 22:
        raise ValueError("it has no end")
    entries, size = struct.unpack("<HI", end[at + 10 : at + 16])
    if entries > LARGEST_ARCHIVE or size > 2**16:
        raise ValueError(f"{entries:,} members, whose list has {size:,} bytes, are too many")


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """A folder as it is, or a zip of one unpacked for the length of a block; UserError for what isn't plain.

    Only uncompressed members without a folder in their names are taken, so that nothing grows or leaves its place.
    """
    if not path.is_file() or path.is_symlink():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="scaleot-") as name:
        folder = Path(name) / "unpacked"
        folder.mkdir()
        try:
            _check_directory(path)
            with zipfile.ZipFile(path) as given:
                members = given.infolist()
                if len(members) > LARGEST_ARCHIVE or sum(member.file_size for member in members) > path.stat().st_size:
                    raise UserError(f"{path}: its members are more or larger than the archive can hold")
                if len({member.filename for member in members}) < len(members):
                    raise UserError(f"{path}: a member is there twice")
                for member in members:
                    plain = Path(member.filename).name == member.filename and member.filename not in ("", ".", "..")
                    stored = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
                    link = (member.external_attr >> 16) & 0o170000 not in (0, 0o100000)
                    if not plain or "\\" in member.filename or not stored or link:
                        raise UserError(f"{path}: member {member.filename!r} is not a plain, uncompressed file")
                    with given.open(member) as stream, (folder / member.filename).open("wb") as out:
                        shutil.copyfileobj(stream, out, 2**20)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a sound archive ({one_line(error)}); fetch it again") from None
        yield folder
