"""Pack a folder into one zip and unpack it: plain, uncompressed members only, so that nothing grows or escapes."""

import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import atomic_file, atomic_folder, read_pieces
from scaleot_core.common.progress import byte_progress
from scaleot_core.exchange.manifest import MOST_FILES
from scaleot_core.exchange.untrusted import is_litter

LARGEST_ARCHIVE = MOST_FILES + 3  # members: files, the manifest, a model card and a signature
LARGEST_DIRECTORY = 2 * MOST_FILES  # members whose names are read, so that a message can name a wrong one


def archive(folder: Path, target: Path) -> None:
    """Put a folder's files into one uncompressed zip; the same folder gives the same bytes."""
    files = sorted(folder.iterdir())
    with (
        byte_progress(f"writing {target.name}", sum(file.stat().st_size for file in files)) as moved,
        atomic_file(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as target_zip,
    ):
        for file in files:
            entry = zipfile.ZipInfo(file.name)  # of a fixed date
            with file.open("rb") as stream, target_zip.open(entry, "w", force_zip64=True) as out:
                for piece in read_pieces(stream, moved):
                    out.write(piece)


def check_new(out: Path, *beside: Path) -> None:
    """Raise UserError where `out` exists or can't be written, before hours of work.

    `beside` are files that will be written as well: they may exist, but not as folders.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: it is there already; name another, or delete it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{out}: it can't be written ({error.strerror or one_line(error)}); name another place"
        ) from None
    for file in beside:
        if file.is_dir():
            raise UserError(f"{file}: a folder is there, where a file will be written; move it away")


@contextmanager
def new_output(out: Path, *beside: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `out`, a folder or a zip by its name, when the block ends well.

    UserError as in `check_new`.
    """
    check_new(out, *beside)
    if out.suffix.lower() != ".zip":
        with atomic_folder(out) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        yield Path(name)
        archive(Path(name), out)


def _check_directory(path: Path) -> None:
    """Raise ValueError where a zip's end announces a larger directory than ours have: reading it would take memory."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 2**16 - 22))
        end = stream.read()
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) - at < 22:
        raise ValueError("it has no end")
    entries, size = struct.unpack("<HI", end[at + 10 : at + 16])
    if end[max(0, at - 20) : at][:4] == b"PK\x06\x07":  # of more than 4 GB, the end that counts is before
        start = path.stat().st_size - len(end)
        large = end[max(0, at - 76) : at - 20]
        if at < 76 or large[:4] != b"PK\x06\x06" or struct.unpack("<Q", end[at - 12 : at - 4]) != (start + at - 76,):
            raise ValueError("it has two ends")
        entries, size = struct.unpack("<QQ", large[32:48])
    if entries > LARGEST_DIRECTORY or size > 2**16:
        raise ValueError(f"{entries:,} members, whose list has {size:,} bytes, are too many")


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield a folder as it is, or a zip unpacked for the length of a block.

    UserError for a link, a missing or damaged file, and members that are compressed, in a folder or no plain files.
    """
    if path.is_symlink():
        raise UserError(f"{path}: it is a link, which is not followed; name what it leads to")
    if not path.exists():
        raise UserError(f"{path}: no such folder or archive; correct the path")
    if not path.is_file():
        yield path
        return
    with _room_beside(path) as name:
        folder = Path(name) / "unpacked"
        folder.mkdir()
        try:
            _check_directory(path)
            with zipfile.ZipFile(path) as source:
                members = source.infolist()
                for member in members:
                    _check_plain(path, member)
                if len(members) > LARGEST_ARCHIVE or sum(member.file_size for member in members) > path.stat().st_size:
                    raise UserError(f"{path}: its members are more or larger than the archive can hold")
                if len({member.filename for member in members}) < len(members):
                    raise UserError(f"{path}: a member is there twice")
                size, room = sum(member.file_size for member in members), shutil.disk_usage(folder).free
                if size > room:
                    raise UserError(
                        f"{path}: unpacked it has {size:,} bytes, {folder.parent.parent} has room for {room:,}"
                    )
                with byte_progress(f"unpacking {path.name}", size) as moved:
                    for member in members:
                        with source.open(member) as stream, (folder / member.filename).open("wb") as out:
                            for piece in read_pieces(stream, moved):
                                out.write(piece)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a sound zip archive ({one_line(error)}); fetch it again") from None
        yield folder


def _room_beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder beside a file, since /tmp may be small or memory; in /tmp where that isn't allowed."""
    try:
        return tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError:
        return tempfile.TemporaryDirectory(prefix="scaleot-")


def _check_plain(path: Path, member: zipfile.ZipInfo) -> None:
    """Raise UserError, naming what a zip program did, unless a member is a plain, uncompressed file."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    shown = repr(name[:200])
    is_safe = (
        "\\" not in name and ".." not in Path(name).parts and not Path(name).is_absolute() and name not in ("", ".")
    )
    if not is_safe or kind not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
        raise UserError(f"{path}: member {shown} is not a plain, uncompressed file")
    if is_litter(name):
        raise UserError(f"{path}: {shown} is the operating system's; unpack it, delete that, and name the folder")
    if Path(name).name != name or kind == stat.S_IFDIR:
        folder = repr(name.partition("/")[0][:200])
        raise UserError(f"{path}: its files lie in a folder, {folder}; unpack it and name that folder")
    if member.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path}: it is compressed; unpack it and name the folder, or pack it uncompressed (zip -0)")
