"""Where what crosses lies: permissions, links, what can't be written, and what other programs make of it."""

import json
import os
import stat
import zipfile
from pathlib import Path

import pytest
from helpers import refusal, refused, scaleot, tiny_model, write_package
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.files import atomic_file, atomic_folder, write_json
from scaleot_core.exchange.archive import new_output
from scaleot_core.exchange.package import Package


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_and_folders_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    with atomic_file(tmp_path / "file") as file:
        file.write_text("x")
    with atomic_folder(tmp_path / "folder") as folder:
        write_json(folder / "inside.json", {})
    assert mode(tmp_path / "file") == mode(tmp_path / "folder/inside.json") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask


def test_what_stays_private_is_its_owners_alone(tmp_path: Path, umask: int) -> None:
    write_json(tmp_path / "private.json", {}, private=True)
    assert mode(tmp_path / "private.json") == 0o600


@pytest.fixture
def linked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A package whose files are links into a cache, as DVC leaves them with `cache.type symlink`."""
    package = write_package(tmp_path / "package", tiny_model("llama"), tokenizer)
    (tmp_path / "cache").mkdir()
    for file in list(package.iterdir()):
        target = file.rename(tmp_path / "cache" / file.name)
        file.symlink_to(target)
    return package


def test_links_are_followed_in_the_pipelines_own_folders_alone(linked: Path, tmp_path: Path) -> None:
    package = Package(linked, links=True)
    package.check()
    assert len(package.tokenizer()) > 250
    assert "it is a link, which is not followed" in refusal(lambda: Package(linked))
    (tmp_path / "name").symlink_to(tmp_path / "cache")
    assert "it is a link, which is not followed" in refusal(lambda: Package(tmp_path / "name"))


def test_files_that_a_library_writes_keep_the_umask_too(tmp_path: Path, umask: int) -> None:
    """safetensors writes through a file that is its owner's alone."""
    with atomic_folder(tmp_path / "model") as folder:
        tiny_model("llama").save_pretrained(folder)
        (folder / "inside").mkdir(mode=0o700)
    assert {mode(file) for file in (tmp_path / "model").iterdir() if file.is_file()} == {0o666 & ~umask}
    assert mode(tmp_path / "model" / "inside") == 0o777 & ~umask


@pytest.mark.parametrize("name", ["adapter.zip", "adapter"])
@pytest.mark.parametrize("place", ["/proc/nope", "/proc", "file/below", "file"])
def test_what_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")

    def work() -> None:
        with new_output(Path(place) / name):
            pytest.fail("the work began")

    said = refusal(work)
    assert said.startswith(f"{place}/{name}: it can't be written (") and said.endswith("; name another place")


def test_folder_that_is_not_there_yet_is_made_and_one_in_the_way_of_a_private_file_told(tmp_path: Path) -> None:
    with new_output(tmp_path / "deep" / "down" / "a.zip") as folder:
        write_json(folder / "x.json", {})
        assert folder.parent == tmp_path / "deep" / "down"  # not in a /tmp that may be memory
    assert [file.name for file in (tmp_path / "deep" / "down").iterdir()] == ["a.zip"]
    (tmp_path / "b.private.json").mkdir()

    def work() -> None:
        with new_output(tmp_path / "b", tmp_path / "b.private.json"):
            pytest.fail("the work began")

    assert "b.private.json: a folder is there" in refusal(work)


@pytest.fixture
def package(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_package(tmp_path / "package", tiny_model("llama"), tokenizer)


def zipped(folder: Path, target: Path, *, prefix: str = "", more: dict[str, str] | None = None, **how: int) -> Path:
    """A folder as an ordinary program zips it."""
    with zipfile.ZipFile(target, "w", **how) as made:
        for file in sorted(folder.iterdir()):
            made.write(file, prefix + file.name)
        for name, text in (more or {}).items():
            made.writestr(name, text)
    return target


def test_what_ordinary_programs_make_of_a_package_is_told(tmp_path: Path, package: Path) -> None:
    mac = {f"__MACOSX/._{file.name}": "x" for file in package.iterdir()} | {".DS_Store": "x"}
    stored = {"compression": zipfile.ZIP_STORED}
    for name, made, told in (
        ("c", zipped(package, tmp_path / "c.zip", compression=zipfile.ZIP_DEFLATED), "it is compressed; unpack it"),
        ("f", zipped(package, tmp_path / "f.zip", prefix="package/", **stored), "lie in a folder, 'package'"),
        ("m", zipped(package, tmp_path / "m.zip", more=mac, **stored), "'__MACOSX/._adapter.safetensors' is the oper"),
        ("d", zipped(package, tmp_path / "d.zip", more={".DS_Store": "x"}, **stored), "'.DS_Store' is the operating"),
    ):
        said = refused("inspect", made)
        assert f"{name}.zip: " in said and told in said, said
    assert scaleot("inspect", zipped(package, tmp_path / "sound.zip", **stored)).code == 0
    for name in (".DS_Store", "Thumbs.db", "._manifest.json"):
        (package / name).write_text("x")
        assert f"{name!r} is the operating system's; delete it" in refused("inspect", package)
        (package / name).unlink()
    (package / "__MACOSX").mkdir()
    assert "'__MACOSX' is the operating system's; delete it" in refused("inspect", package)


def test_path_that_leads_nowhere_or_by_a_link_is_told(tmp_path: Path, package: Path) -> None:
    assert "nowhere: no such folder or archive" in refused("inspect", tmp_path / "nowhere")
    archive = zipped(package, tmp_path / "sound.zip", compression=zipfile.ZIP_STORED)
    for target in (package, archive, tmp_path / "nowhere"):
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        assert "it is a link, which is not followed; name what it leads to" in refused("inspect", link)


def test_private_files_of_the_manifest_are_unchanged_by_permissions(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1}, private=True)
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
