"""Whatever comes from the other side is hostile: every malformed package, adapter and archive ends in one line.

Each case takes a sound folder, does one thing to it as an attacker would, brings the manifest in line with that unless
the damage is to the manifest itself, and hands the folder to the command that would use it.
"""

import ast
import json
import shutil
import struct
import time

import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    change_manifest,
    list_again,
    refused,
    scaleot,
    snapshot,
    tiny_model,
    write_adapter,
    write_package,
)

from scaleot_core.common.files import read_json, write_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.exchange.package import Package
from scaleot_core.settings import LoraForm

SECONDS = 2.0  # within which a refusal comes
ADAPTER = "adapter.safetensors"
LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "base.safetensors"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


# --- what an attacker does -------------------------------------------------------------------------------


def raw(text):
    """Another text in the manifest's place."""
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def states(**changes):
    return lambda folder: change_manifest(folder, **changes)


def replaces(old, new):
    """The manifest's text with a part of it changed."""

    def damage(folder):
        text = (folder / "manifest.json").read_text()
        assert old in text
        (folder / "manifest.json").write_text(text.replace(old, new, 1))

    return damage


def lists(name, content="x"):
    """A file of that name, listed, and there if such a name can be."""

    def damage(folder):
        files = read_json(folder / "manifest.json")["files"]
        files[name] = {"bytes": len(content), "sha256": "0" * 64}
        change_manifest(folder, files=files)
        if name and "/" not in name and name not in (".", ".."):
            (folder / name).write_text(content)
            list_again(folder, name)

    return damage


def holds(file, change, then=list_again):
    """Other tensors in a file, listed with its new hash."""

    def damage(folder):
        tensors = change(read_tensors(folder / file))
        write_tensors(folder / file, tensors)
        then(folder, file)

    return damage


def put(name, tensor):
    return lambda tensors: {key: t for key, t in {**tensors, name: tensor}.items() if t is not None}


def filled(name, value):
    def change(tensors):
        tensors[name].view(-1)[3] = value
        return tensors

    return change


def swapped(tensors):
    """Another layer's number in every name."""
    return {key.replace(".1.", ".2."): tensor for key, tensor in tensors.items()}


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def header(file, change):
    """Another header before the same bytes of a safetensors file; `change` gives JSON text, or bytes in all."""

    def damage(folder):
        content = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        given = change(json.loads(content[8 : 8 + size]), content[8 + size :])
        if isinstance(given, str):
            given = struct.pack("<Q", len(given)) + given.encode() + content[8 + size :]
        (folder / file).write_bytes(given)
        list_again(folder, file)

    return damage


def entry(name, **changes):
    def change(head, data):
        head[name] = {**head[name], **changes}
        return json.dumps(head)

    return change


def alias(head, data):
    """Two tensors that share bytes."""
    places = {}
    for name, place in head.items():
        if name != "__metadata__":
            places.setdefault(tuple(place["shape"]), []).append(name)
    first, second = next(names for names in places.values() if len(names) > 1)[:2]
    head[first]["data_offsets"] = head[second]["data_offsets"]
    return json.dumps(head)


def twice(head, data):
    text = json.dumps(head)
    name = next(name for name in head if name != "__metadata__")
    return text[:-1] + f', "{name}": {json.dumps(head[name])}}}'


def appends(file, content):
    def damage(folder):
        (folder / file).write_bytes((folder / file).read_bytes() + content)
        list_again(folder, file)

    return damage


def gone(name):
    """A file that is neither there nor listed."""

    def damage(folder):
        (folder / name).unlink()
        files = read_json(folder / "manifest.json")["files"]
        del files[name]
        change_manifest(folder, files=files)

    return damage


def text(file, content, then=list_again):
    def damage(folder):
        (folder / file).write_text(content)
        then(folder, file)

    return damage


def tokens(**changes):
    """Other settings of the tokenizer."""

    def damage(folder):
        config = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", {**config, **changes})
        list_again(folder, "tokenizer_config.json")

    return damage


def architecture(**changes):
    def damage(folder):
        change_manifest(folder, architecture={**read_json(folder / "manifest.json")["architecture"], **changes})

    return damage


def link_to_elsewhere(name):
    def damage(folder):
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def flip(name, at=0.5):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * at)] ^= 4
        (folder / name).write_bytes(content)

    return damage


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def is_a_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def lora_states(**changes):
    def damage(folder):
        write_json(folder / LORA_CONFIG, {**read_json(folder / LORA_CONFIG), **changes})
        list_again(folder, LORA_CONFIG)

    return damage


Q = "base_model.model.model.layers.1.self_attn.q_proj"
FORM = {"rank": 3, "alpha": 5.0, "layers": "all", "modules": "all"}
RANKS = {f"{name}_proj": [4] for name in "qkvo"}
DEEP = "[" * 100_000 + "]" * 100_000
MANIFESTS = {
    "empty manifest": raw(""),
    "manifest of no JSON": raw("{half"),
    "manifest that is a list": raw("[]"),
    "manifest that is null": raw("null"),
    "manifest that is a number": raw("7"),
    "manifest of no text": raw(b"\xff\xfe\x00{"),
    "manifest nested deeply": raw('{"format": ' + DEEP + "}"),
    "manifest of two megabytes": replaces("{", "{" + " " * 2**21),
    "manifest with a key twice": replaces('"format_version"', '"format": "scaleot-emulator", "format_version"'),
    "manifest with NaN": replaces("{", '{"more": NaN,'),
    "manifest with infinity": replaces("{", '{"more": -Infinity,'),
    "manifest with an endless number": replaces("{", '{"more": ' + "9" * 10_000 + ","),
    "manifest with another key": states(more=1),
    "no format": states(format=None),
    "another format": states(format="other"),
    "format that is a list": states(format=["scaleot-adapter"]),
    "later version": states(format_version=99),
    "version as text": states(format_version="1"),
    "no files": states(files=None),
    "files that are a list": states(files=[]),
    "no file listed": states(files={}),
    "thousand files listed": states(files={f"{i}.safetensors": {"bytes": 1, "sha256": "0" * 64} for i in range(1000)}),
    "manifest that is a link": link_to_elsewhere("manifest.json"),
    "manifest that is a folder": is_a_folder("manifest.json"),
    "name that leaves the folder": lists("../secret"),
    "absolute name": lists("/etc/passwd"),
    "name in a folder": lists("sub/secret"),
    "backslashes in a name": lists("..\\secret"),
    "empty name": lists(""),
    "name of the folder": lists("."),
    "pickle, listed": lists("adapter.bin"),
    "Python, listed": lists("modeling.py"),
    "file that is not listed": lambda folder: (folder / "extra.safetensors").write_text("x"),
    "folder inside": lambda folder: (folder / "sub").mkdir(),
}
PACKAGES = {
    **MANIFESTS,
    "flipped byte": flip(BASE),
    "flipped byte in a header": flip(BASE, 0.0001),
    "flipped byte of the tokenizer": flip("tokenizer.json"),
    "truncated file": cut(BASE),
    "truncated file, listed so": lambda folder: (cut(BASE)(folder), list_again(folder, BASE)),
    "empty file, listed": text(BASE, ""),
    "text for tensors, listed": text(BASE, "no tensors" * 9),
    "file gone": lambda folder: (folder / "harmonizer.safetensors").unlink(),
    "link in a file's place": link_to_elsewhere(BASE),
    "folder in a file's place": is_a_folder(BASE),
    "negative size": replaces('"bytes": ', '"bytes": -'),
    "hash that is none": replaces('"sha256": "', '"sha256": "x'),
    "NaN": holds(BASE, filled(NORM, float("nan"))),
    "infinity": holds("harmonizer.safetensors", lambda ts: {k: t / 0 for k, t in ts.items()}),
    "tensor too many": holds(BASE, put("model.secret", torch.ones(2))),
    "tensor gone": holds(BASE, put(NORM, None)),
    "another shape": holds(BASE, put(NORM, torch.ones(33))),
    "transposed": holds("adapter.safetensors", put(UP, torch.ones(32, 64))),
    "another dtype": holds(BASE, put(NORM, torch.ones(32, dtype=torch.float64))),
    "whole numbers": holds(BASE, put(NORM, torch.ones(32, dtype=torch.int32))),
    "layers swapped": holds("adapter.safetensors", swapped),
    "name that leaves the model": holds(BASE, put("../../weight", torch.ones(2))),
    "long name": holds(BASE, put("n" * 100_000, torch.ones(2))),
    "header of another size": header(BASE, lambda head, data: struct.pack("<Q", 2**62) + data),
    "header nested deeply": header(BASE, lambda head, data: DEEP),
    "huge shape": header(BASE, entry(NORM, shape=[2**40, 2**20])),
    "negative shape": header(BASE, entry(NORM, shape=[-32])),
    "dtype that is none": header(BASE, entry(NORM, dtype="F7")),
    "bytes beyond the end": header(BASE, entry(NORM, data_offsets=[0, 2**50])),
    "bytes that overlap": header(BASE, alias),
    "tensor twice in a header": header(BASE, twice),
    "bytes behind the tensors": appends(BASE, b"\0" * 64),
    "unknown kind of layer": states(layers=["adapter", "adapter", "compressed", "pickled"]),
    "other plan": states(layers=["adapter", "harmonizer", "compressed", "compressed"]),
    "million layers": states(layers=["adapter"] * 10**5),
    "thousand layers": lambda folder: (
        states(layers=["adapter"] * 1024)(folder),
        architecture(num_hidden_layers=1024)(folder),
    ),
    "as many layers as there may be": lambda folder: (
        states(layers=["adapter"] * 256)(folder),
        architecture(num_hidden_layers=256)(folder),
    ),
    "layer too many": states(layers=["harmonizer", "adapter", "compressed", "compressed", "adapter"]),
    "β above one": states(beta=1.5),
    "shared with nothing": states(layers=["harmonizer", "adapter", "compressed", "shared"]),
    "shared with a harmonizer": states(layers=["harmonizer", "adapter", "compressed", "shared"], like={"3": 0}),
    "shared with itself": states(layers=["harmonizer", "adapter", "compressed", "shared"], like={"3": 3}),
    "like that is no number": states(like={"x": 1}),
    "cut of an adapter layer": states(cuts={"1": {"ranks": RANKS, "channels": 8}}),
    "cut of other projections": states(cuts={"2": {"ranks": {"evil": [1]}, "channels": 8}}),
    "cut to nothing": states(cuts={"2": {"ranks": RANKS, "channels": 0}}),
    "cut to more channels than memory has": states(cuts={"2": {"ranks": RANKS, "channels": 10**13}}),
    "cut to other channels": states(cuts={"2": {"ranks": RANKS, "channels": 8}}),
    "a removed layer": states(layers=["removed", "adapter", "compressed", "compressed"]),
    "another β": states(beta=0.1),
    "another semantics": states(rank_semantics="kept"),
    "huge harmonizers": states(harmonizer={"rank": 10**9}),
    "figures of text": states(figures="all of it"),
    "figures that aren't finite": replaces("{", '{"figures": {"piqa": {"lora": {"acc": Infinity}}},'),
    "figures of adapters that are none": states(figures={"piqa": {"evil": {"acc": 1.0}}}),
    "figures whose names steer a terminal": states(figures={"\x1b]0;owned\x07": {"lora": {"acc": 1.0}}}),
    "figures of very many tasks": states(figures={f"t{i}": {"lora": {"acc": 1.0}} for i in range(100)}),
    "no decoder layer": states(layers=["harmonizer"] * 4),
    "huge license": states(license="x" * 10_000),
    "dtype that is unknown": states(dtype="float8"),
    "another dtype stated": states(dtype="bfloat16"),
    "no architecture": states(architecture=None),
    "architecture that is a list": states(architecture=[]),
    "unsupported architecture": architecture(model_type="bert"),
    "architecture of another code": architecture(model_type="../evil"),
    "remote code": architecture(auto_map={"AutoModelForCausalLM": "evil--code.Model"}),
    "another attention": architecture(attn_implementation="kernels-community/evil"),
    "quantization": architecture(quantization_config={"quant_method": "evil"}),
    "huge hidden size": architecture(hidden_size=10**9),
    "hidden size that is negative": architecture(hidden_size=-32),
    "hidden size of text": architecture(hidden_size="32"),
    "huge vocabulary": architecture(vocab_size=10**12),
    "huge heads": architecture(head_dim=10**9),
    "no heads": architecture(num_attention_heads=0),
    "billion layers": architecture(num_hidden_layers=10**9),
    "no activation": architecture(hidden_act="evil"),
    "rotary positions of no kind": architecture(rope_parameters={"rope_type": "evil"}),
    "tokenizer of no JSON": text("tokenizer.json", "{half"),
    "tokenizer that is a list": text("tokenizer.json", "[]"),
    "tokenizer's settings of no JSON": text("tokenizer_config.json", "{half"),
    "tokenizer's remote code": tokens(
        auto_map={"AutoTokenizer": ["evil--code.Tokenizer", None]}, tokenizer_class="Evil"
    ),
    "tokenizer's vocabulary from elsewhere": tokens(vocab="/etc/passwd", tokenizer_class="BertTokenizer"),
    "tokenizer's vocabulary by its setting": tokens(vocab_file="/etc/passwd"),
    "tokenizer of another class": tokens(tokenizer_class="BertTokenizer"),
    "tokenizer with a number beyond the model": text(
        "tokenizer.json",
        '{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null, '
        '"decoder": null, "truncation": null, "padding": null, '
        '"model": {"type": "WordLevel", "vocab": {"count": 5000000, "a": 1}, "unk_token": "a"}}',
    ),
    "tokenizer that panics": text(
        "tokenizer.json",
        '{"version": "1.0", "added_tokens": [], "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, '
        '"pre_tokenizer": null, "post_processor": null, "decoder": null, "truncation": null, "padding": null, '
        '"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"}}',
    ),
    "tokenizer gone": gone("tokenizer.json"),
    "no adapter layer": states(layers=["harmonizer", "compressed", "compressed", "compressed"]),
    "heads that don't go together": architecture(num_key_value_heads=3, head_dim=8),
    "output that is no output": architecture(return_dict=False),
    "qwen of very many layers": lambda folder: (
        states(layers=["adapter"] * 4)(folder),
        architecture(model_type="qwen2", num_hidden_layers=10**8)(folder),
    ),
    "keys that steer a terminal": states(**{"\x1b]0;owned\x07\nok": 1}),
    "tokenizer with more tokens than the model": tokens(
        added_tokens_decoder={}, extra_special_tokens=[f"<{i}>" for i in range(99)]
    ),
}
ADAPTERS = {
    **MANIFESTS,
    "flipped byte": flip(ADAPTER),
    "truncated file": cut(ADAPTER),
    "file gone": lambda folder: (folder / ADAPTER).unlink(),
    "link in a file's place": link_to_elsewhere(ADAPTER),
    "another package": states(package="1" * 64),
    "package that is no hash": states(package="mine"),
    "other layers": states(layers=[2]),
    "more layers": states(layers=[1, 2]),
    "no layers": states(layers=[]),
    "layers of text": states(layers=["1; import os"]),
    "LoRA that isn't there": states(lora=FORM),
    "record with more in it": states(tuning={"lr": 1e-3, "steps": 1, "batch_size": 1, "data": "private"}),
    "NaN": holds(ADAPTER, filled(UP, float("nan"))),
    "infinity": holds(ADAPTER, filled(UP, float("-inf"))),
    "tensor too many": holds(ADAPTER, put(NORM, torch.ones(32))),
    "tensor gone": holds(ADAPTER, put(UP, None)),
    "another shape": holds(ADAPTER, put(UP, torch.ones(64, 33))),
    "another dtype": holds(ADAPTER, put(UP, torch.ones(64, 32, dtype=torch.float16))),
    "layers swapped": holds(ADAPTER, swapped),
    "huge shape": header(ADAPTER, entry(UP, shape=[2**40, 2**20])),
    "bytes that overlap": header(ADAPTER, alias),
}
LORAS = {
    "LoRA denied": states(lora=None),
    "LoRA of another rank": states(lora={**FORM, "rank": 4}),
    "LoRA of a huge rank": states(lora={**FORM, "rank": 10**6}),
    "LoRA of a rank above a matrix's": lambda folder: (
        states(lora={**FORM, "rank": 17})(folder),
        lora_states(r=17)(folder),
    ),
    "LoRA of another scale": states(lora={**FORM, "alpha": 6.0}),
    "LoRA of a scale that is none": replaces('"alpha": 5.0', '"alpha": NaN'),
    "LoRA of no scale": states(lora={**FORM, "alpha": 0}),
    "LoRA of a scale beyond numbers": lambda folder: (
        states(lora={**FORM, "alpha": 1e300})(folder),
        lora_states(lora_alpha=1e300)(folder),
    ),
    "LoRA in other layers": states(layers=[1]),
    "LoRA in the adapter layers, it says": lambda folder: (
        states(lora={**FORM, "layers": "adapter"}, layers=[1])(folder),
        lora_states(layers_to_transform=[1])(folder),
    ),
    "LoRA in a harmonizer's place": lambda folder: (
        states(layers=[0, 1, 2, 3])(folder),
        lora_states(layers_to_transform=[0, 1, 2, 3])(folder),
    ),
    "LoRA in the attention, it says": states(lora={**FORM, "modules": "attention"}),
    "LoRA in modules that are none": states(lora={**FORM, "modules": "lm_head"}),
    "LoRA with more in it": states(lora={**FORM, "dora": True}),
    "LoRA of another model": holds(LORA, renamed("model.layers.", "transformer.h.")),
    "LoRA of other matrices": holds(LORA, renamed("self_attn.q_proj", "mlp.q_proj")),
    "LoRA of the head": holds(LORA, put("base_model.model.lm_head.lora_A.weight", torch.ones(3, 32))),
    "a LoRA matrix gone": holds(LORA, put(f"{Q}.lora_B.weight", None)),
    "a LoRA matrix transposed": holds(LORA, put(f"{Q}.lora_A.weight", torch.ones(32, 3))),
    "LoRA of another dtype": holds(LORA, put(f"{Q}.lora_A.weight", torch.ones(3, 32, dtype=torch.float16))),
    "LoRA too large for numbers": holds(LORA, lambda ts: {k: torch.full_like(t, 1e30) for k, t in ts.items()}),
    "configuration gone": lambda folder: (folder / LORA_CONFIG).unlink(),
    "configuration that is a list": text(LORA_CONFIG, "[]"),
    "configuration nested deeply": text(LORA_CONFIG, DEEP),
    "other modules": lora_states(target_modules=["embed_tokens"]),
    "modules to save": lora_states(modules_to_save=["lm_head"]),
    "code to map": lora_states(auto_mapping={"base_model_class": "evil", "parent_library": "evil"}),
    "another kind of adapter": lora_states(peft_type="EVIL"),
    "other weights at the start": lora_states(init_lora_weights="pissa"),
    "a setting of tomorrow": lora_states(evil="https://evil.example"),
    "layers of LoRA swapped": holds(LORA, swapped),
    "NaN in LoRA": holds(LORA, lambda ts: {k: t * float("nan") for k, t in ts.items()}),
}


# --- every one of them is refused ------------------------------------------------------------------------


def refuses(folder, *command):
    """One line, soon, and nothing is written."""
    before, start = snapshot(folder.parent), time.perf_counter()
    said = refused(*command)
    took = time.perf_counter() - start
    assert snapshot(folder.parent) == before and took < SECONDS, took
    assert len(said) < 600 and said.isprintable(), said


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    """A sound package, two sound adapters, the real model and a record."""
    folder = tmp_path_factory.mktemp("sound")
    package = write_package(folder / "package", tiny_model("llama"), tokenizer)
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, lora in (("full", None), ("lora", LoraForm.model_validate(FORM))):
        write_adapter(folder / name, Package(package).load(CPU), lora, Package(package))
    (folder / "records.jsonl").write_text('{"prompt": "count", "completion": " to one"}\n' * 9)
    return folder


@pytest.fixture
def copied(tmp_path, sound):
    """Copies of some of what is sound, alone in a folder."""

    def copy(name):
        shutil.copytree(sound / name, tmp_path / "given" / name)
        return tmp_path / "given" / name

    return copy


@pytest.mark.parametrize("case", PACKAGES)
def test_malformed_package_is_refused(sound, copied, case):
    folder = copied("package")
    PACKAGES[case](folder)
    refuses(folder, "tune", folder, "--data", sound / "records.jsonl", "--out", folder.parent / "out", "--threads", 1)


@pytest.mark.parametrize("case", ADAPTERS)
def test_malformed_adapter_is_refused(sound, copied, case):
    folder = copied("full")
    ADAPTERS[case](folder)
    refuses(folder, "check", folder, "--package", sound / "package")
    refuses(folder, "plug", sound / "model", folder, "--package", sound / "package", "--out", folder.parent / "out")


@pytest.mark.parametrize("case", LORAS)
def test_malformed_lora_adapter_is_refused(sound, copied, case):
    folder = copied("lora")
    LORAS[case](folder)
    refuses(folder, "check", folder, "--package", sound / "package")


@pytest.mark.parametrize("name", ["package", "full", "lora"])
def test_what_is_not_damaged_is_not_refused(sound, copied, name):
    folder = copied(name)
    assert scaleot("inspect", folder).code == 0
    if name == "package":
        out = ("--data", sound / "records.jsonl", "--out", folder.parent / "out", "--threads", 1, "--epochs", 1)
        assert scaleot("tune", folder, *out).code == 0
    else:
        assert scaleot("check", folder, "--package", sound / "package").code == 0


def test_folder_that_is_a_link(sound, tmp_path):
    (tmp_path / "link").symlink_to(sound / "package")
    refuses(tmp_path / "link", "inspect", tmp_path / "link")


# --- what the code never does ----------------------------------------------------------------------------


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "eval", "exec", "torch.load"}


def nodes():
    for file in [*ROOT.glob("scaleot_core/**/*.py"), *ROOT.glob("stages/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            yield file.name, node


def test_no_pickle_and_no_code_from_data_anywhere():
    used = set()
    for _, node in nodes():
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {str(node.module).split(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call):
            used.add(ast.unparse(node.func))
    assert "torch" in used and "torch.manual_seed" not in used and not used & FORBIDDEN


def test_no_remote_code_anywhere():
    asked = [
        (name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for name, node in nodes()
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained")
    ]
    ours = [options for name, options in asked if name != "embedded.py"]  # whose file is of a known hash
    assert len(ours) > 3 and all(options["trust_remote_code"] == "False" for options in ours)
    assert all(options.get("trust_remote_code", "False") == "False" for _, options in asked)
