"""Rows of the files that people have: JSON Lines, a JSON array, CSV or Parquet, plain or compressed.

Parquet comes with a schema and is read by `datasets`. JSON and CSV are parsed by the standard library, as they stand:
`datasets` infers a schema for them, by which a text that looks like a date comes back as a timestamp, 007 as 7 and an
absent field as null, and its errors name no line.
"""

import csv
import glob
import io
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import parse_json, parse_jsonl

Row = dict[str, Any]
PARQUET = b"PAR1"  # how such a file begins, and compressed ones:
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte of 0x5_: a frame of Zstandard, or of LZ4, that says nothing
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield where each row of a file lies, such as `records.jsonl, line 3`, and the row itself, as they are read.

    The content tells compression (gzip, bzip2, Zstandard, LZ4), Parquet and a JSON array from JSON Lines; the name
    tells CSV, and TSV, whose fields tabs separate. Text is UTF-8, or UTF-16 with a byte-order mark. UserError for a
    file that can't be read, and for the first row that isn't sound.
    """
    if file.is_dir():
        raise UserError(f"{file}: it is a folder; name one file of records")
    with _refusing_damage(file), _open(file) as stream:
        start = stream.peek(64)
        if start.startswith(PARQUET):
            yield from _read_parquet(file)
            return
        encoding = json.detect_encoding(start[:4])
        if b"\0" in start and encoding == "utf-8":
            raise UserError(f"{file}: it is no text; records are JSON Lines, a JSON list, CSV or Parquet")
        suffixes = [suffix.lower() for suffix in file.suffixes]
        separator = next((mark for suffix, mark in SEPARATORS.items() if suffix in suffixes), None)
        text = io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="" if separator else None)
        beginning = start.decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n")
        if separator:
            yield from _read_csv(file, text, separator)
        elif beginning.startswith("["):
            yield from _read_array(file, text)
        elif beginning.split("\n")[0].rstrip() == "{":
            raise UserError(f"{file}: its first object goes over several lines; give each its own, or all in one list")
        else:
            for number, row in parse_jsonl(str(file), _objects(file, _checked(file, text))):
                yield f"{file}, line {number}", row


def read_text_file(file: Path) -> str:
    """Return a text file's text, plain or compressed, with `\\n` at every line's end; UserError if it can't be read."""
    with _refusing_damage(file), _open(file) as stream:
        encoding = json.detect_encoding(stream.peek(4)[:4])
        lines = io.TextIOWrapper(stream, encoding, errors="surrogateescape")
        return "".join(_checked(file, lines)).removeprefix("\ufeff")


def _open(file: Path) -> io.BufferedReader:
    """Open a file's content, decompressed where it begins as a compressed one does. A pipe will do."""
    import pyarrow

    stream = file.open("rb")
    while stream.peek(8)[1:4] == SKIPPABLE and stream.peek(1)[0] >> 4 == 5:
        stream.read(int.from_bytes(stream.read(8)[4:], "little"))
    start = stream.peek(4)
    for magic, codec in COMPRESSED.items():
        if start.startswith(magic):
            return io.BufferedReader(pyarrow.input_stream(stream, compression=codec))
    return stream


@contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, EOFError, UnicodeError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: it can't be read to its end ({one_line(error)})") from error


def _checked(file: Path, lines: TextIO) -> Iterator[str]:
    """Yield the lines of a text; UserError names the first that isn't in the file's encoding."""
    for number, line in enumerate(lines, start=1):
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:  # bytes that were no UTF-8 stand there as lone surrogates
                raise UserError(f"{file}, line {number}: not UTF-8 text; save the file in UTF-8") from None
        yield line


def _objects(file: Path, lines: Iterator[str]) -> Iterator[str]:
    """Yield lines less their ends; UserError names the first that begins as an object and doesn't end as one."""
    for number, line in enumerate(lines, start=1):
        text = line.rstrip()
        if text.removeprefix("\ufeff").lstrip().startswith("{") and not text.endswith("}"):
            raise UserError(
                f"{file}, line {number}: not valid JSON (its object doesn't end in }} at column {len(text)}); give "
                "each record one line, whole and without a comma behind it"
            )
        yield text


def _read_array(file: Path, text: TextIO) -> Iterator[tuple[str, Row]]:
    rows = parse_json(str(file), "".join(_checked(file, text)).removeprefix("\ufeff"))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, record {number}: a JSON object is needed, this is a {type(row).__name__}")
        yield f"{file}, record {number}", row


def _read_csv(file: Path, text: TextIO, separator: str) -> Iterator[tuple[str, Row]]:
    """Yield rows by the names in the first line; every value is text."""
    csv.field_size_limit(2**31 - 1)  # 131,072 characters, which a document may have, are the library's own limit
    lines: list[str] = []  # of the row that was read last

    def remembered() -> Iterator[str]:
        for line in _checked(file, text):
            lines.append(line)
            yield line

    reader = csv.DictReader(remembered(), delimiter=separator, strict=True)
    names = list(reader.fieldnames or [])
    for mark in (";", "\t", "|", ","):
        if len(names) == 1 and mark in names[0]:
            words = "commas" if separator == "," else "tabs"
            raise UserError(f"{file}, line 1: fields are separated by {words}, these by {mark!r}; save it with {words}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{file}, line 1: the column {twice!r} is there twice; delete one")
    lines.clear()
    for row in reader:
        where = f"{file}, line {reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where}: it has more or fewer fields than the first line, which names them")
        if re.search(rf'{re.escape(separator)}[ \t]+"', "".join(lines)):
            for name, value in row.items():
                if value[:1].isspace() and value.lstrip().startswith('"'):
                    raise UserError(f"{where}: a blank stands before the quote of {name!r}; delete it")
        lines.clear()
        yield where, row


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import datasets

    level = datasets.logging.get_verbosity()
    with tempfile.TemporaryDirectory() as cache:  # nothing is left in the user's home
        try:
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its own lines, beside the error that we tell
            rows = datasets.load_dataset(
                "parquet", data_files=glob.escape(str(file.resolve())), split="train", streaming=True, cache_dir=cache
            )
            for number, row in enumerate(rows, start=1):
                yield f"{file}, row {number}", _drop_nulls(row)
        finally:
            datasets.logging.set_verbosity(level)


def _drop_nulls(value: Any) -> Any:
    """Leave out null fields: a columnar file has a null wherever a row lacks a field that another row has."""
    if isinstance(value, dict):
        return {name: _drop_nulls(field) for name, field in value.items() if field is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value
