"""Which files are read, and which of a folder, by their names; what is in one, `rows` finds out."""

from pathlib import Path

from scaleot_core.common.errors import UserError

PACKED = ("", ".gz", ".zst", ".bz2", ".lz4")
ROWS = (".parquet", *(f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv") for packed in PACKED))
TEXTS = tuple(f".txt{packed}" for packed in PACKED)
READ = ".jsonl, .json, .csv, .parquet"


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Tell whether a file's name ends in one of some suffixes, in whatever case."""
    return name.lower().endswith(suffixes)


def split_file(folder: Path, part: str) -> Path:
    """Return the file that has one part of a data set, such as train.jsonl or train.parquet.

    Where there is none, it is the name that it should have. UserError for two.
    """
    there = sorted(folder.glob(f"{part}.*")) if folder.is_dir() else []
    found = [file for file in there if file.name.lower().removeprefix(part) in ROWS]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one of them")
    return found[0] if found else folder / f"{part}.jsonl"
