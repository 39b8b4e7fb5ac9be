"""Name the kinds of files that are read; what is in one, `rows` finds out."""

import re
from pathlib import Path

from scaleot_core.common.errors import UserError

PACKED = ("", ".gz", ".zst", ".bz2", ".lz4")
ROWS = (".parquet", *(f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".tsv") for packed in PACKED))
TEXTS = tuple(f".txt{packed}" for packed in PACKED)
READ = ".jsonl, .json, .csv, .tsv, .parquet"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # as the hub takes it


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Tell whether a file's name ends in one of some suffixes, whatever the case."""
    return name.lower().endswith(suffixes)


def split_file(folder: Path, part: str) -> Path:
    """Return the file that has one part of a data set, such as train.jsonl or train.parquet.

    Where there is none, it is the name that it should have. UserError for two.
    """
    files = sorted(file for file in folder.glob(f"{part}.*") if file.name.lower().removeprefix(part) in ROWS)
    if len(files) > 1:
        raise UserError(f"{folder}: both {files[0].name} and {files[1].name} are there; keep one of them")
    return files[0] if files else folder / f"{part}.jsonl"


def is_path(source: str) -> bool:
    """Tell whether a source can only be a file or a folder: no repository on the hub has such a name."""
    return not HUB_NAME.fullmatch(source) or has_suffix(source, (*ROWS, *TEXTS))
