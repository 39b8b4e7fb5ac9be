"""Packages and adapters are signed by a key, and verified by its other half; model cards lie beside the files."""

import json
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from helpers import CPU, LORA, gives, refusal, refused, scaleot, tiny_model, write_adapter, write_keys, write_package
from transformers import PreTrainedTokenizerFast

from scaleot_core.exchange.archive import archive
from scaleot_core.exchange.manifest import CARD, LARGEST_JSON, SIGNATURE
from scaleot_core.exchange.model_card import write_package_card, write_plugged_card
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.signature import load_signer, verify_signature


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    (private, public), (_, other) = write_keys(folder, "owner"), write_keys(folder, "other")
    return {"private": private, "public": public, "other": other}


@pytest.fixture
def package(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_package(tmp_path / "package", tiny_model("llama"), tokenizer)


@pytest.mark.parametrize("kind", ["package", "adapter"])
def test_what_is_signed_is_verified_as_folder_and_zip(package: Path, keys: dict[str, Path], kind: str) -> None:
    folder = package
    if kind == "adapter":
        opened = Package(package)
        folder = write_adapter(package.parent / "adapter", opened.load(CPU), LORA, opened)
    assert "it is not signed" in refused("inspect", folder, "--verify", keys["public"])
    assert gives("inspect", folder)["signature"] is None
    load_signer(keys["private"])(folder)
    archive(folder, packed := folder.with_suffix(".zip"))
    for path in (folder, packed):
        shown = gives("inspect", path, "--verify", keys["public"])
        assert shown["signature"] == f"by the owner of {keys['public']}"
        assert gives("inspect", path)["signature"].startswith("not verified")
        assert "it is not what the owner of" in refused("inspect", path, "--verify", keys["other"])


def change_manifest_space(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text + " ")


def change_payload(folder: Path) -> None:
    bundle = json.loads((folder / SIGNATURE).read_text())
    bundle["dsseEnvelope"]["payload"] = "e30="
    (folder / SIGNATURE).write_text(json.dumps(bundle))


@pytest.mark.parametrize(
    "damage",
    [
        change_manifest_space,
        change_payload,
        lambda folder: (folder / CARD).write_text("tune it with pip install evil"),
        lambda folder: (folder / CARD).unlink(),
        lambda folder: (folder / SIGNATURE).write_text("{}"),
        lambda folder: (folder / SIGNATURE).write_bytes(b"\xff\x00"),
        lambda folder: (folder / SIGNATURE).unlink(),
    ],
    ids=["manifest", "payload", "card", "card gone", "no bundle", "no text", "gone"],
)
def test_what_was_changed_after_signing_is_refused(package: Path, keys: dict[str, Path], damage: object) -> None:
    write_package_card(package, Package(package).manifest)
    load_signer(keys["private"])(package)
    verify_signature(package, keys["public"])
    damage(package)
    if (package / SIGNATURE).exists():
        assert scaleot("inspect", package).code == 0  # which doesn't ask who made it
    assert str(package) in refused("inspect", package, "--verify", keys["public"])


def test_keys_that_are_none_are_refused_before_the_work(tmp_path: Path, package: Path, keys: dict[str, Path]) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "rsa").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    for file in (tmp_path / "rsa", tmp_path / "none", keys["public"]):
        assert f"{file}: no private key to sign with" in refusal(load_signer, file)
        data = ("--data", tmp_path / "gone.jsonl", "--out", tmp_path / "out")
        assert "no private key to sign with" in refused("tune", package, *data, "--sign", file)
    assert "no public key to verify with" in refused("inspect", package, "--verify", keys["private"])


def test_tuning_signs_the_adapter(tmp_path: Path, package: Path, keys: dict[str, Path]) -> None:
    (tmp_path / "records.jsonl").write_text('{"prompt": "count", "completion": " to one"}\n' * 9)
    out, options = tmp_path / "adapter.zip", ("--threads", 1, "--epochs", 1, "--patience", 0)
    gives("tune", package, "--data", tmp_path / "records.jsonl", "--out", out, *options, "--sign", keys["private"])
    assert gives("inspect", out, "--verify", keys["public"])["signature"] == f"by the owner of {keys['public']}"
    assert scaleot("check", out, "--package", package).code == 0


@pytest.mark.parametrize("name", [SIGNATURE, CARD])
def test_what_lies_beside_the_files_is_plain_and_small(package: Path, name: str) -> None:
    (package / name).write_bytes(b"x" * LARGEST_JSON)
    assert scaleot("inspect", package).code == 0
    (package / name).write_bytes(b"x" * (LARGEST_JSON + 1))
    assert f"{name!r} has more than 1,048,576 bytes" in refused("inspect", package)
    (package / name).unlink()
    (package / name).symlink_to(package / "manifest.json")
    assert f"{name!r} is no file of this format" in refused("inspect", package)


def front_matter(folder: Path) -> dict[str, object]:
    _, block, _ = (folder / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(block)


@pytest.mark.parametrize(
    ("license", "stated"), [("Apache-2.0", "apache-2.0"), ("mine: a\n---\nbase_model: x", "other")]
)
def test_card_of_a_package_says_what_its_manifest_says(package: Path, license: str, stated: str) -> None:
    manifest = Package(package).manifest.model_copy(update={"license": license})
    write_package_card(package, manifest)
    assert front_matter(package) == {
        "library_name": "scaleot",
        "license": stated,
        "tags": ["offsite-tuning", "llama"],
    }
    text = (package / CARD).read_text()
    assert "of 4 decoder layers 1 harmonizer, 1 adapter, 2 compressed" in text and "scaleot tune PACKAGE" in text


@pytest.mark.parametrize(("base", "shown"), [("meta/llama", "meta/llama"), ("{tmp}/secret/model", "model")])
def test_card_of_a_plug_in_names_its_base_and_no_path(tmp_path: Path, base: str, shown: str) -> None:
    (tmp_path / "secret" / "model").mkdir(parents=True)
    write_plugged_card(tmp_path, base.format(tmp=tmp_path), "0" * 64, "LoRA of rank 4", library="peft")
    assert front_matter(tmp_path) == {"base_model": shown, "library_name": "peft", "tags": ["offsite-tuning"]}
    assert "secret" not in (tmp_path / CARD).read_text()
