"""Files that appear whole or not at all, and what a damaged one says."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fill_disk, refusal, snapshot

from scaleot_core.common import files
from scaleot_core.common.files import (
    atomic_file,
    atomic_folder,
    fingerprint,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from scaleot_core.common.tensors import TensorWriter, read_tensors, write_tensors

FAILURES = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), SystemExit(1)]


def old_folder(parent: Path) -> Path:
    folder = parent / "out"
    folder.mkdir()
    (folder / "a").write_text("old a")
    (folder / "b").write_text("old b")
    return folder


def test_whole_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    target = old_folder(tmp_path)
    with atomic_folder(target) as out:
        (out / "c").write_text("new")
        assert set(snapshot(target)) == {"a", "b"}  # until the block has ended
    assert snapshot(tmp_path) == {"out": None, "out/c": b"new"}


def test_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    for text in ("old", "new"):
        with atomic_file(target) as out:
            out.write_text(text)
    assert snapshot(tmp_path) == {"deep": None, "deep/file": b"new"}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("existing", [True, False])
def test_whole_folder_that_fails_leaves_what_was_there(tmp_path: Path, failure: BaseException, existing: bool) -> None:
    target = old_folder(tmp_path) if existing else tmp_path / "out"
    before = snapshot(tmp_path)
    with pytest.raises(type(failure)), atomic_folder(target) as out:
        (out / "a").write_text("half")
        raise failure
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("existing", [True, False])
def test_whole_file_that_fails_leaves_what_was_there(tmp_path: Path, failure: BaseException, existing: bool) -> None:
    target = tmp_path / "file"
    if existing:
        target.write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(type(failure)), atomic_file(target) as out:
        out.write_text("half")
        raise failure
    assert snapshot(tmp_path) == before


def test_whole_folder_outlives_a_death_while_the_old_one_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_folder(tmp_path)

    def dies(folder: Path, **options: Any) -> None:
        next(Path(folder).iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as out:
        (out / "a").write_text("new a")
        (out / "b").write_text("new b")
    assert snapshot(target) in ({"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b"})


def test_whole_folder_that_cannot_be_renamed_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_folder(tmp_path)
    before = snapshot(tmp_path)
    rename, refused = Path.replace, []

    def refuse_once(path: Path, to: Path) -> Path:
        if to == target and not refused:
            refused.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    monkeypatch.setattr(Path, "replace", refuse_once)
    with pytest.raises(OSError), atomic_folder(target) as out:
        (out / "a").write_text("new a")
    assert refused and snapshot(tmp_path) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "folder") as out:
            write_json(out / "file", 1)
            write_tensors(out / "tensors", {"a": torch.ones(1)})  # which safetensors would keep to their owner
            (out / "inside").mkdir(mode=0o700)
        with atomic_file(tmp_path / "single") as file:
            file.write_text("x")
        write_json(tmp_path / "private", {}, private=True)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    public_files = dict.fromkeys(("single", "folder/file", "folder/tensors"), 0o666 & ~umask)
    assert modes == {"private": 0o600, **public_files, **dict.fromkeys(("folder", "folder/inside"), 0o777 & ~umask)}


@pytest.mark.parametrize("write", [write_json, write_tensors])
def test_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Any], None]
) -> None:
    (tmp_path / "file").write_text("old")
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", {} if write is write_json else {"a": torch.ones(9)})
    assert snapshot(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_an_error_without_a_name_gets_that_of_what_was_written(
    tmp_path: Path, atomic: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    with pytest.raises(OSError, match="No space left") as raised, atomic(tmp_path / "target"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "target") and not snapshot(tmp_path)


def test_rows_that_break_off_leave_the_old_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows", [{"old": 1}])
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_jsonl(tmp_path / "rows", ({"new": 1 / i} for i in (2, 1, 0)))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "file", {"loss": 1.0})
    before = snapshot(tmp_path)
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", {"rows": [{"loss": value}]})
    assert snapshot(tmp_path) == before


def test_json_comes_back_and_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "α": [0.1, None]})
    write_json(tmp_path / "b", {"α": [0.1, None], "x": 1})
    assert read_json(tmp_path / "a") == {"x": 1, "α": [0.1, None]}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("content", [None, b"", b'{"a": ', b"\xff\xfe"])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert refusal(read_json, tmp_path / "a.json").startswith(f"{tmp_path / 'a.json'}: ")


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    """In whatever order they come, contiguous or not, trained or not."""
    tensors = {f"layer.{i}": torch.randn(3, 4, dtype=dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16])}
    other = {name: t.T.contiguous().T.requires_grad_() for name, t in reversed(tensors.items())}
    write_tensors(tmp_path / "a", tensors)
    write_tensors(tmp_path / "b", other)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = read_tensors(tmp_path / "b")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda sound: b"",
        lambda sound: sound[:4],
        lambda sound: sound[:30],
        lambda sound: sound[:-1],
        lambda sound: sound + b"x",
        lambda sound: sound[:8] + b"x" * 20 + sound[28:],
        lambda sound: b"<!DOCTYPE html>\n" * 20,
    ],
    ids=["empty", "no header", "half a header", "truncated", "too long", "header overwritten", "an error page"],
)
def test_damaged_tensors_are_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"w": torch.arange(100)})
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(read_tensors, file).startswith(f"{file}: not a sound safetensors file (")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_written_one_by_one_give_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b.weight": torch.randn(3, 5), "a": torch.randn(7), "c.x": torch.randn(()), "b.bias": torch.randn(2, 0)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "whole", tensors)
    writer = TensorWriter(tmp_path / "parts", {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match="was not written"):
            writer.check_whole()
        writer.write(name, tensor)
    writer.check_whole()
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_tensors_of_many_dtypes_are_aligned_and_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(2).double(), "c": torch.randn(5).half(), "d": torch.arange(3)}
    write_tensors(tmp_path / "file", tensors)
    read = read_tensors(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    size = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "file").read_bytes()[8 : 8 + size])
    assert size % 8 == 0
    assert all(entry["data_offsets"][0] % tensors[name].itemsize == 0 for name, entry in header.items())


def test_tensor_that_was_not_announced_is_refused(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "file", {"a": ((2,), torch.float32)})
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2).half())):
        with pytest.raises(ValueError, match="is to be written"):
            writer.write(name, tensor)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="is to be written"):
        writer.write("a", torch.zeros(2))


def test_some_tensors_of_a_file(tmp_path: Path) -> None:
    tensors = {"1.a": torch.zeros(2), "11.a": torch.ones(2), "1.b": torch.ones(3)}
    write_tensors(tmp_path / "file", tensors)
    assert read_tensors(tmp_path / "file", "1.").keys() == {"1.a", "1.b"}


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    assert refusal(read_tensors, tmp_path / "a.safetensors").startswith(f"{tmp_path / 'a.safetensors'}: no such file")


@pytest.mark.parametrize("row", ['{"half": ', "[1]", '"text"', "null"])
def test_line_that_is_no_row_is_named(tmp_path: Path, row: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"fine": 1}}\n\n{row}\n{{"fine": 2}}\n')  # an empty line counts, but isn't an error
    assert refusal(read_jsonl, file).startswith(f"{file}, line 3: ")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    assert refusal(read_jsonl, tmp_path / "a.jsonl").startswith(f"{tmp_path / 'a.jsonl'}: ")


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [{"text": "two\nlines, a \\ and a \r"}, {"text": "α 中 🙂", "label": 1}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


BAD_ROWS = [
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON (maximum recursion depth exceeded"),
    (rb'{"a": "cut \ud83d"}', r"\ud83d is half of a character"),
    (b'{"a": 1, "a": 2}', "not valid JSON (the key 'a' is there twice)"),
    (b'{"a": 1', "not valid JSON (Expecting ',' delimiter at column 8)"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS, ids=[said for _, said in BAD_ROWS])
def test_row_that_no_one_could_use_is_named(tmp_path: Path, row: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"fine": 1}\n' + row)
    assert refusal(read_jsonl, tmp_path / "a.jsonl").startswith(f"{tmp_path / 'a.jsonl'}, line 2: {said}")


def test_byte_order_mark_is_no_part_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}\r\n'.encode("utf-8-sig") * 2)  # two such files, put together
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}] * 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_rows_with_unusual_line_separators_come_back(tmp_path: Path, separator: str) -> None:
    rows = [{"text": f"one{separator}two"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")  # as others write it
    assert read_jsonl(tmp_path / "a.jsonl") == rows


def content_folder(folder: Path, **content: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in content.items():
        (folder / name).write_text(text)
    return folder


def test_fingerprint_is_of_content_and_not_of_place(tmp_path: Path) -> None:
    here, there = (content_folder(tmp_path / name, a="1", b="2") for name in ("here", "there"))
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1})


@pytest.mark.parametrize("content", [{"a": "1", "b": "3"}, {"a": "2", "b": "1"}, {"a": "1"}, {"a": "1", "c": "2"}])
def test_fingerprint_tells_folders_apart(tmp_path: Path, content: dict[str, str]) -> None:
    first, second = content_folder(tmp_path / "first", a="1", b="2"), content_folder(tmp_path / "second", **content)
    assert fingerprint(first) != fingerprint(second)


def test_fingerprint_sees_files_deep_in_a_folder(tmp_path: Path) -> None:
    marks = set()
    for text in ("1", "2"):
        write_json(tmp_path / "a" / "b" / "file", text)
        marks.add(fingerprint(tmp_path))
    assert len(marks) == 2


def test_fingerprint_of_a_file_follows_its_content(tmp_path: Path) -> None:
    marks = set()
    for text in ("1", "2", "1"):
        (tmp_path / "file").write_text(text)
        marks.add(fingerprint(tmp_path / "file"))
    assert len(marks) == 2


def test_fingerprint_tells_values_apart() -> None:
    values: list[tuple[Any, ...]] = [
        ({"lr": 0.1}, 0),
        ({"lr": 0.2}, 0),
        ({"lr": 0.1}, 1),
        (0, {"lr": 0.1}),
        ("0",),
        (0,),
    ]
    assert len({fingerprint(*parts) for parts in values}) == len(values)


def test_folder_bytes_counts_one_kind_of_file(tmp_path: Path) -> None:
    folder = content_folder(tmp_path / "a")
    for name, size in (("a.bin", 3), ("b.bin", 4), ("c.txt", 100)):
        (folder / name).write_bytes(b"x" * size)
    assert files.folder_bytes(folder, ".bin") == 7


def test_leftovers_of_a_killed_run_go_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    killed, others = tmp_path / ".out.new-12345678", tmp_path / ".out.progress"
    for folder in (killed, others):
        folder.mkdir()
    with atomic_folder(tmp_path / "out") as live:
        (live / "a").write_text("live")
        with atomic_folder(tmp_path / "out"):
            pass
        assert live.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.progress", "out"]
    assert (tmp_path / "out" / "a").read_text() == "live"
