"""Keep what an interrupted tuning goes on from, beside its output, for its owner alone and for one run at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from shutil import rmtree

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json, write_json


def progress_folder(out: Path) -> Path:
    """Name the hidden folder, beside `out`, of what an interrupted tuning goes on from."""
    return out.with_name(f".{out.name}.progress")


@contextmanager
def held(out: Path) -> Iterator[tuple[Path, datetime]]:
    """Yield the progress folder of an output, held by this run alone, and when its tuning began.

    UserError where the folder is a link or another's, and where another run holds it.
    """
    folder = progress_folder(out)
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and folder.stat().st_uid == os.geteuid())):
        raise UserError(f"{folder}: progress is kept in a folder of your own, and this is none; delete it")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another run is writing it; wait for it, or choose another --out") from None
        started = folder / "started.json"
        if started.is_file() and _has_state(folder):
            began = datetime.fromisoformat(read_json(started)["began"])
        else:
            began = datetime.now()
            write_json(started, {"began": began.isoformat()}, private=True)
        try:
            yield folder, began
        finally:
            if not _has_state(folder):
                rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _has_state(folder: Path) -> bool:
    """Say whether there is something to go on from."""
    return any(path.is_dir() for path in folder.glob("*"))


@contextmanager
def private_files() -> Iterator[None]:
    """Let what is written meanwhile be read by its owner alone."""
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)
