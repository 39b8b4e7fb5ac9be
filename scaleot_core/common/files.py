"""Write files that appear whole or not at all, and read JSON, JSON lines and CSV back with checks."""

import csv
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.launch import is_main_process

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # of a surrogate pair, in JSON


def _mode(maximum: int) -> int:
    """Return the permissions of a new file or folder: the maximum, less the user's umask."""
    umask = os.umask(0)
    os.umask(umask)
    return maximum & ~umask


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Name the target in an OSError that has no file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(target)
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well and vanishes when it doesn't."""
    if not is_main_process():
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _locked_folder(target)
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        with _naming(target):
            yield temporary
        folder_mode, file_mode = _mode(0o777), _mode(0o666)
        for path in (temporary, *temporary.rglob("*")):  # safetensors leaves files that their owner alone can read
            path.chmod(folder_mode if path.is_dir() else file_mode)
        if target.exists():
            target.replace(old)
        temporary.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    shutil.rmtree(old, ignore_errors=True)


def _locked_folder(target: Path) -> tuple[Path, int]:
    """Make a temporary folder beside `target`, locked while this run lives; remove what killed runs left there.

    Return it and its lock, to be closed.
    """
    prefix = f".{target.name}.new-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):  # another run's, or gone meanwhile
            lock = _lock(left)
            if not left.name.endswith(".old"):
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        with suppress(OSError):  # taken for a leftover before it was locked
            lock = _lock(folder)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _lock(folder: Path) -> int:
    """Lock a folder and return what holds the lock; OSError where another run has it, or it is none."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


@contextmanager
def atomic_file(target: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it when the block ends well.

    A private file can be read by its owner alone, whatever the umask.
    """
    if not is_main_process():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / target.name
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _naming(target):
            yield temporary
        temporary.chmod(0o600 if private else _mode(0o666))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any, *, private: bool = False) -> None:
    """Write `data` as indented JSON with sorted keys; NaN and infinity are refused (ValueError)."""
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with atomic_file(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read one JSON file; UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}); make it again") from None


def cached_json(file: Path, measure: Callable[[], Any]) -> Any:
    """Return the content of a JSON file; if there is none, measure it and write it there.

    The file lies in a folder whose name has a `fingerprint` of all that the measurement depends on.
    """
    if file.exists():
        return read_json(file)
    value = measure()
    write_json(file, value)
    return json.loads(json.dumps(value))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; a value that JSON lacks, such as a date of a Parquet file, as text."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


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
    """Yield each line's number, from 1, and its JSON object, blank lines aside.

    A byte-order mark is skipped wherever a line begins with it, as in files that were put together. UserError for a
    line that is no object, or not fit to be one (`parse_json`).
    """
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff")
        if text.strip():
            row = parse_json(f"{name}, line {number}", text)
            if not isinstance(row, dict):
                raise UserError(f"{name}, line {number}: a JSON object is needed, this is a {type(row).__name__}")
            yield number, row


def parse_json(where: str, text: str) -> Any:
    """Parse JSON that a person gave; UserError, which begins with `where`, if it isn't sound.

    Refused are a key that comes twice, of which one value would silently win; nesting too deep to be read; and half of
    a surrogate pair in a string, which no tokenizer takes and which can't be written as UTF-8.
    """
    try:
        value = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        what = one_line(error)
        if isinstance(error, json.JSONDecodeError) and "\n" not in text.strip():
            what = f"{error.msg} at column {error.colno}"  # the line's number is that in the file
        raise UserError(f"{where}: not valid JSON ({what})") from None
    if HALF_CHARACTER.search(text):  # most are one half of a whole pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise UserError(
                f"{where}: {half} is half of a character, as where a text was cut in the middle of an emoji; delete it"
            ) from None
        except RecursionError as error:
            raise UserError(f"{where}: not valid JSON ({one_line(error)})") from None
    return value


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of a JSON parser's pairs; ValueError where a key comes twice."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        fields[key] = value
    return fields


def sha256(path: Path) -> str:
    """Compute the hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_pieces(stream: IO[bytes], moved: Callable[[int], None], size: int = sys.maxsize) -> Iterator[bytes]:
    """Yield the next `size` bytes of a stream, or all it has, in pieces of at most a MiB; report the bytes of each."""
    while piece := stream.read(min(size, 2**20)):
        yield piece
        size -= len(piece)
        moved(len(piece))


def fingerprint(*parts: Any) -> str:
    """Hash JSON-able values and, for a Path, the content of that file or of all files in that folder; 16 hex digits.

    It names whatever is cached outside DVC. Its parts are the data and the code that the cached value depends on:
    `fingerprint(Path(svd.__file__), tensor_hash(weight))`. So an edit of the code makes the value anew.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = (
                sorted(p for p in part.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
                if part.is_dir()
                else [part]
            )
            for file in files:
                digest.update(f"{file.name}:{sha256(file)}\n".encode())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def folder_bytes(folder: Path, suffix: str) -> int:
    """Count the bytes of the files in a folder whose names end in `suffix`."""
    return sum(file.stat().st_size for file in folder.glob(f"*{suffix}"))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV: these columns of them, or all that the first row has."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(
            stream, columns or list(rows[0]), extrasaction="ignore" if columns else "raise", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV by its header, numbers as numbers; UserError if it is missing."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(stream)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro` to make it") from None
