"""A package in shards is the package in one file a part; every way in which its shards can be wrong is refused."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from damages import flip
from helpers import (
    CPU,
    LORA,
    change_manifest,
    list_again,
    plan_of,
    plan_of_kinds,
    refused,
    scaleot,
    snapshot,
    tiny_model,
    write_adapter,
    write_package,
)
from transformers import PreTrainedTokenizerFast

from scaleot_core.common import progress
from scaleot_core.common.files import read_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.exchange import shards
from scaleot_core.exchange.archive import archive, unpacked
from scaleot_core.exchange.manifest import CARD
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.shards import part_files

Tensors = dict[str, torch.Tensor]
LIMIT = 20_000  # bytes of a shard, where each layer of the tiny model has 40,000


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", LIMIT)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The same emulator as a package in shards and as one without, the real model and records."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        write_package(folder / "one", tiny_model("llama"), tokenizer)
        patch.setattr(shards, "SHARD_BYTES", LIMIT)
        write_package(folder / "package", tiny_model("llama"), tokenizer)
    tiny_model("llama").save_pretrained(folder / "model", max_shard_size="20KB")
    tokenizer.save_pretrained(folder / "model")
    (folder / "records.jsonl").write_text('{"prompt": "count", "completion": " to one"}\n' * 9)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


# --- the same package ------------------------------------------------------------------------------------


def test_files_follow_from_names_and_shapes_alone() -> None:
    expected = {name: ((size,), torch.float32) for name, size in (("c", 2000), ("a", 4000), ("b", 1000), ("d", 9000))}
    assert part_files("base", expected) == {
        "base-00001-of-00003.safetensors": {name: expected[name] for name in "ab"},  # which fill it
        "base-00002-of-00003.safetensors": {"c": expected["c"]},
        "base-00003-of-00003.safetensors": {"d": expected["d"]},  # larger than a shard may be, so alone
    }
    small = {"a": expected["a"]}
    assert part_files("base", small) == {"base.safetensors": small}
    assert list(part_files("base", dict(reversed(expected.items())))) == list(part_files("base", expected))


def test_package_in_shards_is_the_package(sound: Path) -> None:
    sharded, one = sound / "package", sound / "one"
    assert len(names(one)) == 4 and len(names(sharded)) > 8
    assert all((sharded / name).stat().st_size < LIMIT * 2.2 for name in names(sharded))
    tensors = [
        {k: t for name in names(folder) for k, t in read_tensors(folder / name).items()} for folder in (sharded, one)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def tuned(sound: Path, out: Path, name: str, *options: object) -> Path:
    command = ("tune", sound / name, "--data", sound / "records.jsonl", "--out", out / name, "--lora-rank", 3)
    assert scaleot(*command, "--epochs", 1, "--threads", 1, "--device", "cpu", *options).code == 0
    return out / name


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_tuning_and_plugging_in_give_the_same_bytes(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    written = {}
    for name in ("package", "one"):
        if name == "one":
            monkeypatch.undo()
        adapter = tuned(sound, tmp_path, name, "--adapters", kind)
        plugged = tmp_path / f"{name}-plugged"
        assert scaleot("plug", sound / "model", adapter, "--package", sound / name, "--out", plugged).code == 0
        weights = {file.name: file.read_bytes() for file in adapter.glob("*.safetensors")}
        (plugged / CARD).unlink()  # which names the package
        written[name] = weights, snapshot(plugged)
    assert written["package"] == written["one"]
    assert names(tmp_path / "one-plugged") == names(sound / "model") and len(names(sound / "model")) > 2


def test_archive_of_shards_is_the_package(tmp_path: Path, sound: Path) -> None:
    archive(sound / "package", tmp_path / "packed.zip")
    with unpacked(tmp_path / "packed.zip") as folder:
        assert snapshot(folder) == snapshot(sound / "package")
        Package(folder).check()


# --- what is refused -------------------------------------------------------------------------------------


Damage = Callable[[Path], object]


def relist(folder: Path, old: str, new: str | None = None) -> None:
    """Have the manifest list a file by another name, or not at all."""
    files = read_json(folder / "manifest.json")["files"]
    entry = files.pop(old)
    change_manifest(folder, files=files | ({new: entry} if new else {}))


def renamed(new: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / SHARD).rename(folder / new)
        relist(folder, SHARD, new)

    return damage


def extra(name: str) -> Damage:
    def damage(folder: Path) -> None:
        shutil.copy(folder / SHARD, folder / name)
        list_again(folder, name)

    return damage


def gone_and_not_listed(folder: Path) -> None:
    (folder / SHARD).unlink()
    relist(folder, SHARD)


def divided(change: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]) -> Damage:
    """Other tensors in two shards."""

    def damage(folder: Path) -> None:
        shards = [{name: t.clone() for name, t in read_tensors(folder / file).items()} for file in (SHARD, OTHER)]
        for file, tensors in zip((SHARD, OTHER), change(*shards), strict=True):
            write_tensors(folder / file, tensors)
        list_again(folder, SHARD, OTHER)

    return damage


def moved(first: Tensors, second: Tensors, *, copied: bool = False) -> tuple[Tensors, Tensors]:
    """Move a tensor of the first shard into the second."""
    name = max(first)
    return {key: t for key, t in first.items() if copied or key != name}, {**second, name: first[name]}


def one_file(folder: Path) -> None:
    """A part in one file that should lie in shards."""
    tensors: Tensors = {}
    for file in list(folder.glob("compressed-*")):
        tensors |= {name: tensor.clone() for name, tensor in read_tensors(file).items()}
        file.unlink()
        relist(folder, file.name)
    write_tensors(folder / "compressed.safetensors", tensors)
    list_again(folder, "compressed.safetensors")


SHARD, OTHER = (f"compressed-0000{i}-of-00004.safetensors" for i in (1, 2))
NO_PLACE, NO_FILE, FOREIGN = "has no place among", "is no file of this format", "is missing, foreign or of the wrong"
CASES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda folder: (folder / SHARD).unlink(), "is missing"),
    "missing and not listed": (gone_and_not_listed, "is missing"),
    "one too many": (extra("compressed-00005-of-00004.safetensors"), NO_PLACE),
    "one of another count": (extra("compressed-00001-of-00002.safetensors"), NO_PLACE),
    "one of a part that has one file": (extra("harmonizer-00001-of-00001.safetensors"), NO_PLACE),
    "number zero": (extra("compressed-00000-of-00004.safetensors"), NO_PLACE),
    "absurd number": (renamed("compressed-99999-of-99999.safetensors"), "is missing"),
    "very long number": (renamed(f"compressed-{'9' * 90}-of-00004.safetensors"), NO_FILE),
    "negative number": (renamed("compressed--0001-of-00004.safetensors"), NO_FILE),
    "number in other digits": (renamed(f"compressed-{chr(0x660) * 5}-of-00004.safetensors"), NO_FILE),
    "part that is none": (renamed("secret-00001-of-00004.safetensors"), NO_FILE),
    "an index, as transformers has it": (extra("model.safetensors.index.json"), NO_FILE),
    "swapped": (divided(lambda first, second: (second, first)), FOREIGN),
    "tensor in the wrong shard": (divided(moved), FOREIGN),
    "tensor in two shards": (divided(partial(moved, copied=True)), FOREIGN),
    "one file instead": (one_file, "is missing"),
    "another content": (flip(SHARD, 0.999), "the content is not what the manifest says"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_shards_are_refused(tmp_path: Path, sound: Path, case: str) -> None:
    folder = tmp_path / "package"
    shutil.copytree(sound / "package", folder)
    assert {SHARD, OTHER, "compressed-00004-of-00004.safetensors"} <= set(names(folder))
    damage, reason = CASES[case]
    damage(folder)
    before = snapshot(tmp_path)
    tune = ("tune", folder, "--data", sound / "records.jsonl", "--out", tmp_path / "out", "--threads", 1)
    for command in (("inspect", folder), tune):
        line = refused(*command)
        assert reason in line and line.isprintable() and len(line) < 400, line
    assert snapshot(tmp_path) == before


def test_content_is_told_before_numbers_that_it_made_infinite(tmp_path: Path, sound: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(sound / "package", folder)
    infinite = {name: torch.full_like(tensor, torch.inf) for name, tensor in read_tensors(folder / SHARD).items()}
    write_tensors(folder / SHARD, infinite)
    assert "the content is not" in refused("inspect", folder)
    list_again(folder, SHARD)
    assert "not finite" in refused("inspect", folder)


def test_plug_finds_a_damaged_shard_of_what_the_real_model_is_compared_with(tmp_path: Path, sound: Path) -> None:
    shutil.copytree(sound / "package", tmp_path / "package")
    package = Package(tmp_path / "package")
    adapter = write_adapter(tmp_path / "adapter", package.load(CPU), None, package)
    (shard, *_) = (tmp_path / "package").glob("base-00001-*")
    flip(shard.name, 0.999)(package.folder)
    line = refused("plug", sound / "model", adapter, "--package", package.folder, "--out", tmp_path / "out")
    assert shard.name in line and "the content is not" in line and not (tmp_path / "out").exists()


def test_large_packages_have_a_progress_bar_and_small_ones_none(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not scaleot("inspect", sound / "package").said
    monkeypatch.setattr(progress, "LARGE", 1000)
    monkeypatch.setattr(progress, "MIB", 1000)
    (line,) = scaleot("inspect", sound / "package").said
    size = sum((sound / "package" / name).stat().st_size for name in names(sound / "package"))
    assert line.startswith("reading the package, MiB: ") and int(line.split("/")[1].split()[0]) == size // 1000


# --- memory ----------------------------------------------------------------------------------------------


PEAK = """
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
import torch
from scaleot_core import cli

status = lambda: dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
mib = lambda name: int(status()[name].split()[0]) / 1024
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = mib("VmRSS")
    sys.argv = ["scaleot", "plug", str(folder / "model"), str(folder / "adapter"), "--package",
                str(folder / "package"), "--out", str(folder / "out")]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code
    print("PEAK", mib("VmHWM") - before, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux has it")
def test_memory_of_plugging_in_does_not_grow_with_the_layers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked against the package and written a layer at a time."""
    wide = {"hidden_size": 256, "intermediate_size": 4096, "num_key_value_heads": 4, "head_dim": 64}
    layer = (4 * 256**2 + 3 * 256 * 4096) * 4 / 2**20  # MiB
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 10**9)
    depths = (2, 4, 12)  # the first is there for what Python imports on the way
    for depth in depths:
        folder = tmp_path / str(depth)
        model = tiny_model("llama", num_hidden_layers=depth, **wide)
        model.save_pretrained(folder / "model", max_shard_size="50MB")
        tokenizer.save_pretrained(folder / "model")
        plan = plan_of(model, plan_of_kinds(("compressed", *["adapter"] * (depth - 1))))
        package = Package(write_package(folder / "package", model, tokenizer, plan))
        write_adapter(folder / "adapter", package.load(CPU), LORA, package)
    folders = [str(tmp_path / str(depth)) for depth in depths]
    returned = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # what is freed leaves the process
    command = [sys.executable, "-c", PEAK, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **returned})
    assert done.returncode == 0, done.stderr
    _, few, many = (float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    assert abs(many - few) < layer  # eight layers more
    assert many < 4 * layer
