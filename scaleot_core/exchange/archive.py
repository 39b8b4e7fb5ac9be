"""One zip for a folder and back: plain, uncompressed members only, nothing that grows or leaves its place."""

import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import atomic_file, atomic_folder

LARGEST_ARCHIVE = 17  # members: sixteen files and the manifest


def archive(folder: Path, target: Path) -> None:
    """Put a folder's files into one uncompressed zip; the same folder gives the same bytes."""
    with atomic_file(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as made:
        for file in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(file.name)  # of a fixed date
            with file.open("rb") as stream, made.open(entry, "w", force_zip64=True) as out:
                shutil.copyfileobj(stream, out, 2**20)


def check_new(out: Path) -> None:
    """UserError where something is there already."""
    if out.exists():
        raise UserError(f"{out}: it is there already; name another, or delete it")


@contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A folder to fill, that becomes `out`, as it is or as a zip by its name, when the block ends well.

    UserError where `out` is there already.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):  # what can't be written is told now, not after hours
        pass
    if out.suffix != ".zip":
        with atomic_folder(out) as folder:
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
def unpacked(path: Path) -> Iterator[Path]:
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
