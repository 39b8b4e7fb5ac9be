"""The manifest of what crosses between the parties: which files, of what size and hash; checked before use.

Whatever the other party sent is hostile until it was checked: only listed files of expected names, no links, no pickle,
JSON within bounds, hashes before content, shapes before memory, finite numbers. A refusal is a UserError.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scaleot_core.common.errors import UserError, one_line, printable
from scaleot_core.common.files import read_pieces, sha256, write_json
from scaleot_core.common.progress import byte_progress
from scaleot_core.exchange.untrusted import LARGEST_JSON, check_hash, is_litter, read_untrusted_json

MANIFEST = "manifest.json"
MOST_LAYERS = 256  # twice as many as the deepest supported models have
MOST_FILES = 256  # half a terabyte in shards
LARGEST_TOKENIZER = 2**26  # bytes of one of the tokenizer's files
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SIGNATURE, CARD = "model.sig", "README.md"  # beside the files and not listed: the first signs the manifest too
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """A file as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Hash


class Manifest(BaseModel):
    """The fields of every manifest; a subclass is one format."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    format: str
    format_version: int
    files: Annotated[dict[str, Entry], Field(max_length=MOST_FILES)]
    """Every file beside the manifest."""


M = TypeVar("M", bound=Manifest)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest, which lists all other files in it."""
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {**manifest, "files": files})


def copy_files(source: Path, folder: Path, manifest: Manifest, **changes: Any) -> None:
    """Copy what a manifest lists into an empty folder, with some of the manifest's own fields changed.

    Each file is read once. UserError for one whose content is not what the manifest says.
    """
    with byte_progress("copying", sum(entry.bytes for entry in manifest.files.values())) as moved:
        for name, entry in manifest.files.items():
            digest = hashlib.sha256()
            with (source / name).open("rb") as stream, (folder / name).open("wb") as out:
                for piece in read_pieces(stream, moved):
                    digest.update(piece)
                    out.write(piece)
            check_hash(source / name, digest.hexdigest(), entry.sha256)
    write_json(folder / MANIFEST, {**manifest.model_dump(mode="json"), **changes})


def manifest_sha256(folder: Path) -> str:
    """Compute the SHA-256 of a folder's manifest, which identifies all that it lists."""
    return sha256(folder / MANIFEST)


def manifest_format(folder: Path) -> str:
    """Return the `format` in a folder's manifest, of ours or not. UserError if there is no manifest."""
    data = read_untrusted_json(folder / MANIFEST)
    return str(data.get("format")) if isinstance(data, dict) else ""


def read_checked(
    folder: Path, kind: type[M], names: Iterable[str], *, later: re.Pattern[str] | None = None, links: bool = False
) -> M:
    """Read a folder's manifest, and check the size and hash of every file that it lists; UserError for any fault.

    Files may have one of `names`, or match `later`: large files, of which only the size is checked here, since their
    reader hashes them in passing. `links` are followed in the pipeline's own folders, where DVC may link to its cache,
    and never in what the other party sent.
    """
    if folder.is_symlink() and not links:
        raise UserError(f"{folder}: it is a link, which is not followed; name the folder that it leads to")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    data = read_untrusted_json(folder / MANIFEST, links=links)
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
    is_plain = {file.name: file.is_file() and (links or not file.is_symlink()) for file in folder.iterdir()}
    large = {name for name in manifest.files.keys() | is_plain.keys() if later is not None and later.fullmatch(name)}
    for name in sorted({*manifest.files, MANIFEST} | is_plain.keys()):
        if name in (SIGNATURE, CARD) and name not in manifest.files and is_plain[name]:
            if (folder / name).stat().st_size > LARGEST_JSON:
                raise UserError(f"{folder}: {name!r} has more than {LARGEST_JSON:,} bytes; delete it, then run again")
            continue
        if is_litter(name) and name in is_plain:
            raise UserError(f"{folder}: {name!r} is the operating system's; delete it, then run again")
        if name not in (*names, MANIFEST, *large) or not is_plain.get(name, True):
            raise UserError(f"{folder}: {name!r} is no file of this format; fetch it again")
        if name not in is_plain:
            raise UserError(f"{folder}: {name!r} is missing; fetch it again")
        if name not in (*manifest.files, MANIFEST):
            raise UserError(f"{folder}: {name!r} is not listed in the manifest; fetch it again")
    for name, entry in manifest.files.items():
        if name in TOKENIZER_FILES and entry.bytes > LARGEST_TOKENIZER:
            raise UserError(f"{folder}: {name!r} has more than {LARGEST_TOKENIZER:,} bytes")
        file = folder / name
        if file.stat().st_size != entry.bytes:
            check_hash(file, "", entry.sha256)
        elif name not in large:
            check_hash(file, sha256(file), entry.sha256)
    return manifest
