"""Where what crosses lies: permissions, links, what can't be written; and tokenizers with several chat templates."""

import json
import os
import stat
from pathlib import Path

import pytest
from helpers import refusal, tiny_model, write_package
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.files import atomic_file, atomic_folder, write_json
from scaleot_core.exchange.archive import new_output
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.tokenizer import check_shippable, load_untrusted_tokenizer, save_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


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


@pytest.mark.parametrize("name", ["adapter.zip", "adapter"])
def test_what_cannot_be_written_is_told_before_the_work(name: str) -> None:
    with pytest.raises(OSError), new_output(Path("/proc/nope") / name):
        pytest.fail("the work began")


def test_several_chat_templates_are_shipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    several = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    several.chat_template = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}
    check_shippable(several)
    save_tokenizer(tmp_path, several)
    assert not [file for file in tmp_path.iterdir() if file.is_dir()]
    assert load_untrusted_tokenizer(tmp_path).chat_template == several.chat_template
    chat = [{"role": "user", "content": "hello"}]
    assert load_untrusted_tokenizer(tmp_path).apply_chat_template(chat, tokenize=False) == "user: hello\n"


def test_tokenizer_that_a_package_cannot_keep_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Shouting(PreTrainedTokenizerFast):
        """Does in Python what its file doesn't say."""

        def __call__(self, text, *args, **options):
            return super().__call__(text.upper(), *args, **options)

    shouting = Shouting(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    assert "more than its tokenizer.json says" in refusal(lambda: check_shippable(shouting))


def test_private_files_of_the_manifest_are_unchanged_by_permissions(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1}, private=True)
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
