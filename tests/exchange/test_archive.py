"""One zip for a folder and back: what can't be written, what other programs make of it, and what an attacker does."""

import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import refusal, refused, scaleot, snapshot, tiny_model, write_package
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.files import write_json
from scaleot_core.exchange import archive as archives
from scaleot_core.exchange.archive import archive, new_output, unpacked


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_package(tmp_path_factory.mktemp("sound") / "package", tiny_model("llama"), tokenizer)


def no_work(*out: Path) -> None:
    with new_output(*out):
        pytest.fail("the work began")


# --- what is written -------------------------------------------------------------------------------------


def test_archive_holds_the_folder_and_leaves_nothing_beside_it(tmp_path: Path, sound: Path) -> None:
    archive(sound, tmp_path / "given.zip")
    with unpacked(tmp_path / "given.zip") as folder:
        assert snapshot(folder) == snapshot(sound)
    assert os.listdir(tmp_path) == ["given.zip"]


@pytest.mark.parametrize("place", ["/proc/nope/out.zip", "/proc/out", "file/below/out", "file/out.zip"])
def test_what_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    reason = refusal(no_work, Path(place))
    assert reason.startswith(f"{place}: it can't be written (") and reason.endswith("; name another place")


def test_folder_that_is_not_there_yet_is_made_and_one_in_the_way_of_a_private_file_told(tmp_path: Path) -> None:
    with new_output(tmp_path / "deep" / "down" / "a.zip") as folder:
        write_json(folder / "x.json", {})
        assert folder.parent == tmp_path / "deep" / "down"  # not in a /tmp that may be memory
    assert os.listdir(tmp_path / "deep" / "down") == ["a.zip"]
    (tmp_path / "b.private.json").mkdir()
    assert "b.private.json: a folder is there" in refusal(no_work, tmp_path / "b", tmp_path / "b.private.json")


# --- what other programs make of a package ---------------------------------------------------------------


def zipped(folder: Path, target: Path, *, prefix: str = "", litter: tuple[str, ...] = (), compression: int = 0) -> Path:
    """Zip a folder as an ordinary program does."""
    with zipfile.ZipFile(target, "w", compression) as stream:
        for file in sorted(folder.iterdir()):
            stream.write(file, prefix + file.name)
        for name in litter:
            stream.writestr(name, "x")
    return target


def test_what_ordinary_programs_make_of_a_package_is_told(tmp_path: Path, sound: Path) -> None:
    mac = (".DS_Store", *(f"__MACOSX/._{file.name}" for file in sorted(sound.iterdir())))
    for target, reason in (
        (zipped(sound, tmp_path / "c.zip", compression=zipfile.ZIP_DEFLATED), "it is compressed; unpack it"),
        (zipped(sound, tmp_path / "f.zip", prefix="package/"), "its files lie in a folder, 'package'"),
        (zipped(sound, tmp_path / "m.zip", litter=mac[1:]), "'__MACOSX/._adapter.safetensors' is the operating"),
        (zipped(sound, tmp_path / "d.zip", litter=mac[:1]), "'.DS_Store' is the operating"),
    ):
        assert f"{target}: {reason}" in refused("inspect", target)
    assert scaleot("inspect", zipped(sound, tmp_path / "sound.zip")).code == 0


def test_path_that_leads_nowhere_or_by_a_link_is_told(tmp_path: Path, sound: Path) -> None:
    assert "nowhere: no such folder or archive" in refused("inspect", tmp_path / "nowhere")
    for target in (sound, zipped(sound, tmp_path / "sound.zip"), tmp_path / "nowhere"):
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        assert "it is a link, which is not followed; name what it leads to" in refused("inspect", link)


def test_archive_larger_than_the_disk_is_told(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(sound, tmp_path / "given.zip")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    assert "has room for 1,000" in refused("inspect", tmp_path / "given.zip")


# --- what an attacker does -------------------------------------------------------------------------------

Attack = Callable[[Path, Path], object]


def member(name: str, content: str = "x", *, kind: int = stat.S_IFREG, compression: int = 0) -> Any:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = (kind | 0o644) << 16, compression
    return info, content


def adds(*members: Any) -> Attack:
    def attack(file: Path, folder: Path) -> None:
        archive(folder, file)
        with zipfile.ZipFile(file, "a") as stream:
            for info, content in members:
                stream.writestr(info, content)

    return attack


def mends(change: Callable[[bytes], bytes]) -> Attack:
    def attack(file: Path, folder: Path) -> None:
        archive(folder, file)
        file.write_bytes(change(file.read_bytes()))

    return attack


def bomb(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("manifest.json", "0" * 10**8)


def lies(content: bytes) -> bytes:
    """Say of a member that it is larger than the archive."""
    at = content.rindex(b"PK\x01\x02") + 20
    return content[:at] + struct.pack("<II", 2**31, 2**31) + content[at + 8 :]


def large(shift: int) -> Callable[[bytes], bytes]:
    """Put a 64-bit end, which is what Python reads then, before the end; it names another place by `shift`."""

    def change(content: bytes) -> bytes:
        record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, 2**31, 0)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(content) - 22 + shift, 1)
        return content[:-22] + record + locator + content[-22:]

    return change


NOT_PLAIN, COMPRESSED, IN_A_FOLDER = (
    "is not a plain, uncompressed file",
    "it is compressed",
    "its files lie in a folder",
)
ATTACKS: dict[str, tuple[Attack, str]] = {
    "empty": (lambda file, folder: file.write_bytes(b""), "it has no end"),
    "no archive": (lambda file, folder: file.write_bytes(b"no archive" * 99), "it has no end"),
    "truncated": (mends(lambda content: content[: len(content) // 2]), "it has no end"),
    "flipped": (
        mends(lambda content: content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]),
        "Bad CRC-32 for file",
    ),
    "bomb": (bomb, COMPRESSED),
    "larger than it is": (mends(lies), "larger than the archive can hold"),
    "no member": (lambda file, folder: zipfile.ZipFile(file, "w").close(), "manifest.json: no such file"),
    "leaves the folder": (adds(member("../evil")), NOT_PLAIN),
    "absolute": (adds(member("/tmp/evil")), NOT_PLAIN),
    "in a folder": (adds(member("sub/evil")), IN_A_FOLDER),
    "backslash": (adds(member("..\\evil")), NOT_PLAIN),
    "folder": (adds(member("sub/", "", kind=stat.S_IFDIR)), IN_A_FOLDER),
    "link": (adds(member("evil.json", "/etc/passwd", kind=stat.S_IFLNK)), NOT_PLAIN),
    "device": (adds(member("evil.json", "", kind=stat.S_IFCHR)), NOT_PLAIN),
    "compressed": (adds(member("evil.json", "x" * 99, compression=zipfile.ZIP_DEFLATED)), COMPRESSED),
    "foreign": (adds(member("evil.py", "import os")), "'evil.py' is no file of this format"),
    "twice": (adds(member("manifest.json", "{}")), "a member is there twice"),
    "directory that lies": (
        mends(lambda content: content[:-14] + struct.pack("<HHI", 60000, 60000, 2**31) + content[-6:]),
        "are too many",
    ),
    "large directory that lies": (mends(large(0)), "bytes, are too many"),
    "large directory elsewhere": (mends(large(1)), "two ends"),
    "thousand members": (adds(*(member(f"{i}", "") for i in range(1000))), "are too many"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ATTACKS)
def test_malformed_archive_is_refused(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    scratch, file = tmp_path / "scratch", tmp_path / "given.zip"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    attack, reason = ATTACKS[case]
    attack(file, sound)
    before = snapshot(tmp_path)
    line = refused("inspect", file)
    assert reason in line and line.isprintable() and len(line) < 600
    assert snapshot(tmp_path) == before
