"""The manifest lists what is there, and nothing else is taken: no link, no litter, no file that isn't listed."""

from pathlib import Path

import pytest
from helpers import refusal, refused, tiny_model, write_package
from transformers import PreTrainedTokenizerFast

from scaleot_core.exchange.package import Package


@pytest.fixture
def package(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_package(tmp_path / "package", tiny_model("llama"), tokenizer)


def test_links_are_followed_in_the_pipelines_own_folders_alone(package: Path, tmp_path: Path) -> None:
    """Where DVC leaves links into its cache with `cache.type symlink`."""
    (tmp_path / "cache").mkdir()
    for file in list(package.iterdir()):
        file.symlink_to(file.rename(tmp_path / "cache" / file.name))
    linked = Package(package, links=True)
    linked.check()
    assert len(linked.tokenizer()) > 250
    assert "it is a link, which is not followed" in refusal(Package, package)
    (tmp_path / "name").symlink_to(tmp_path / "cache")
    assert "it is a link, which is not followed" in refusal(Package, tmp_path / "name")


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "._manifest.json", "__MACOSX/x"])
def test_what_operating_systems_leave_is_told(package: Path, name: str) -> None:
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text("x")
    assert f"{Path(name).parts[0]!r} is the operating system's; delete it" in refused("inspect", package)
