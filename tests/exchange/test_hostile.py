"""Whatever comes from the other side is hostile: every malformed package and adapter ends in one line.

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
from damages import flip, holds
from helpers import (
    CPU,
    LORA,
    ROOT,
    change_manifest,
    list_again,
    plan_of_kinds,
    refused,
    scaleot,
    snapshot,
    tiny_model,
    write_adapter,
    write_package,
)

from scaleot_core.common.files import read_json
from scaleot_core.exchange.package import Package

SECONDS = 2.0  # within which a refusal comes
BASE, HARMONIZER, ADAPTER = (f"{part}.safetensors" for part in ("base", "harmonizer", "adapter"))
FACTORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
DEEP = "[" * 100_000 + "]" * 100_000


# --- what an attacker does -------------------------------------------------------------------------------


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


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


def kinds(*names, sources=None):
    return states(layers=[layer.model_dump(mode="json") for layer in plan_of_kinds(names, sources)])


def layer(index, **changes):
    """Another record of a layer; None takes a key out."""

    def damage(folder):
        layers = read_json(folder / "manifest.json")["layers"]
        layers[index] = {key: value for key, value in {**layers[index], **changes}.items() if value is not None}
        change_manifest(folder, layers=layers)

    return damage


def lists(name):
    """A file of that name, listed, and there if such a name can be."""

    def damage(folder):
        files = read_json(folder / "manifest.json")["files"]
        change_manifest(folder, files={**files, name: {"bytes": 1, "sha256": "0" * 64}})
        if name and "/" not in name and name != ".":
            (folder / name).write_text("x")
            list_again(folder, name)

    return damage


def put(name, tensor):
    return lambda tensors: {key: t for key, t in {**tensors, name: tensor}.items() if t is not None}


def filled(name, value):
    return lambda tensors: {**tensors, name: torch.full_like(tensors[name], value)}


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def header(file, change):
    """Another header before the same bytes of a safetensors file; `change` gives JSON text, or bytes in all."""

    def damage(folder):
        content = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        changed = change(json.loads(content[8 : 8 + size]), content[8 + size :])
        if isinstance(changed, str):
            changed = struct.pack("<Q", len(changed)) + changed.encode() + content[8 + size :]
        (folder / file).write_bytes(changed)
        list_again(folder, file)

    return damage


def entry(name, **changes):
    return lambda head, data: json.dumps({**head, name: {**head[name], **changes}})


def alias(head, data):
    """Two tensors that share bytes."""
    places = {}
    for name, place in head.items():
        if name != "__metadata__":
            places.setdefault(tuple(place["shape"]), []).append(name)
    first, second = next(names for names in places.values() if len(names) > 1)[:2]
    return entry(first, data_offsets=head[second]["data_offsets"])(head, data)


def twice(head, data):
    name = next(name for name in head if name != "__metadata__")
    return json.dumps(head)[:-1] + f', "{name}": {json.dumps(head[name])}}}'


def writes(file, change):
    """Other content of a file, listed; `change` gets what it holds."""

    def damage(folder):
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        list_again(folder, file)

    return damage


def text(file, content):
    return writes(file, lambda before: content.encode())


def json_of(file, **changes):
    """Other settings in a file of JSON."""
    return writes(file, lambda before: json.dumps({**json.loads(before), **changes}).encode())


def tokens(**changes):
    return json_of("tokenizer_config.json", **changes)


def peft(**changes):
    return json_of(PEFT_CONFIG, **changes)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def architecture(**changes):
    def damage(folder):
        change_manifest(folder, architecture={**read_json(folder / "manifest.json")["architecture"], **changes})

    return damage


def gone(name, *, listed=True):
    def damage(folder):
        (folder / name).unlink()
        if not listed:
            files = read_json(folder / "manifest.json")["files"]
            change_manifest(folder, files={key: value for key, value in files.items() if key != name})

    return damage


def link(name):
    return lambda folder: (folder / name).symlink_to((folder / name).rename(folder.parent / "outside"))


def is_a_folder(name):
    return both(gone(name), lambda folder: (folder / name).mkdir())


Q = "base_model.model.model.layers.1.self_attn.q_proj"
FORM = LORA.model_dump()
MANIFESTS = {
    "empty manifest": raw(""),
    "manifest of no JSON": raw("{half"),
    "manifest that is a list": raw("[]"),
    "manifest that is null": raw("null"),
    "manifest of no text": raw(b"\xff\xfe\x00{"),
    "manifest nested deeply": raw('{"format": ' + DEEP + "}"),
    "manifest of two megabytes": replaces("{", "{" + " " * 2**21),
    "manifest with a key twice": replaces('"format_version"', '"format": "scaleot-emulator", "format_version"'),
    "manifest with NaN": replaces("{", '{"more": NaN,'),
    "manifest with infinity": replaces("{", '{"more": -Infinity,'),
    "manifest with an endless number": replaces("{", '{"more": ' + "9" * 10_000 + ","),
    "manifest with another key": states(more=1),
    "no format": states(format=None),
    "format that is a list": states(format=["scaleot-adapter"]),
    "later version": states(format_version=99),
    "version as text": states(format_version="1"),
    "no files": states(files=None),
    "files that are a list": states(files=[]),
    "no file listed": states(files={}),
    "thousand files listed": states(files={f"{i}.safetensors": {"bytes": 1, "sha256": "0" * 64} for i in range(1000)}),
    "manifest that is a link": link("manifest.json"),
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
PLANS = {
    "unknown kind of layer": layer(3, kind="pickled"),
    "other plan": layer(1, kind="harmonizer", harmonizer_rank=8),
    "million layers": kinds(*["adapter"] * 10**5),
    "thousand layers": both(kinds(*["adapter"] * 1024), architecture(num_hidden_layers=1024)),
    "as many layers as there may be": both(kinds(*["adapter"] * 256), architecture(num_hidden_layers=256)),
    "layer too many": kinds("harmonizer", "adapter", "compressed", "compressed", "adapter"),
    "layer with more in it": layer(2, evil=1),
    "rank of nothing": layer(2, ranks={"q_proj": [0]}),
    "another rank": layer(2, ranks={"q_proj": [1]}),
    "ranks beyond memory": layer(2, ranks={"q_proj": [10**13]}),
    "ranks of other projections": layer(2, ranks={"evil": [1]}),
    "shared with nothing": layer(3, kind="shared", ranks=None),
    "shared with a harmonizer": layer(3, kind="shared", ranks=None, source=0),
    "shared with itself": layer(3, kind="shared", ranks=None, source=3),
    "shared with what is beyond": layer(3, kind="shared", ranks=None, source=9),
    "cut of an adapter layer": layer(1, channels=8),
    "cut to nothing": layer(2, channels=0),
    "cut to more channels than memory has": layer(2, channels=10**13),
    "cut to other channels": layer(2, channels=8),
    "a removed layer": layer(0, kind="removed", harmonizer_rank=None),
    "huge harmonizers": layer(0, harmonizer_rank=10**9),
    "no decoder layer": kinds(*["harmonizer"] * 4),
    "no adapter layer": kinds("harmonizer", "compressed", "compressed", "compressed"),
}
WORDS = '"version": "1.0", "added_tokens": [], "pre_tokenizer": null, "post_processor": null, "decoder": null, '
WORDS += '"truncation": null, "padding": null, "model": {"type": "WordLevel", "unk_token": "a", "vocab": '
PACKAGES = {
    **MANIFESTS,
    **PLANS,
    "flipped byte": flip(BASE),
    "flipped byte in a header": flip(BASE, 0.0001),
    "flipped byte of the tokenizer": flip("tokenizer.json"),
    "truncated file": cut(BASE),
    "truncated file, listed so": writes(BASE, lambda content: content[:-9]),
    "empty file, listed": text(BASE, ""),
    "text for tensors, listed": text(BASE, "no tensors" * 9),
    "file gone": gone(HARMONIZER),
    "link in a file's place": link(BASE),
    "folder in a file's place": is_a_folder(BASE),
    "negative size": replaces('"bytes": ', '"bytes": -'),
    "hash that is none": replaces('"sha256": "', '"sha256": "x'),
    "NaN": holds(BASE, filled(NORM, float("nan"))),
    "infinity": holds(HARMONIZER, lambda ts: {k: t / 0 for k, t in ts.items()}),
    "tensor too many": holds(BASE, put("model.secret", torch.ones(2))),
    "tensor gone": holds(BASE, put(NORM, None)),
    "another shape": holds(BASE, put(NORM, torch.ones(33))),
    "transposed": holds(ADAPTER, put(UP, torch.ones(32, 64))),
    "another dtype": holds(BASE, put(NORM, torch.ones(32, dtype=torch.float64))),
    "whole numbers": holds(BASE, put(NORM, torch.ones(32, dtype=torch.int32))),
    "layers swapped": holds(ADAPTER, renamed(".1.", ".2.")),
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
    "bytes behind the tensors": writes(BASE, lambda content: content + b"\0" * 64),
    "figures of text": states(figures="all of it"),
    "figures that aren't finite": replaces("{", '{"figures": {"piqa": {"lora": {"acc": Infinity}}},'),
    "figures of adapters that are none": states(figures={"piqa": {"evil": {"acc": 1.0}}}),
    "figures whose names steer a terminal": states(figures={"\x1b]0;owned\x07": {"lora": {"acc": 1.0}}}),
    "figures of very many tasks": states(figures={f"t{i}": {"lora": {"acc": 1.0}} for i in range(100)}),
    "keys that steer a terminal": states(**{"\x1b]0;owned\x07\nok": 1}),
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
    "heads that don't go together": architecture(num_key_value_heads=3, head_dim=8),
    "billion layers": architecture(num_hidden_layers=10**9),
    "qwen of very many layers": both(
        kinds(*["adapter"] * 4), architecture(model_type="qwen2", num_hidden_layers=10**8)
    ),
    "no activation": architecture(hidden_act="evil"),
    "rotary positions of no kind": architecture(rope_parameters={"rope_type": "evil"}),
    "output that is no output": architecture(return_dict=False),
    "tokenizer gone": gone("tokenizer.json", listed=False),
    "tokenizer of no JSON": text("tokenizer.json", "{half"),
    "tokenizer that is a list": text("tokenizer.json", "[]"),
    "tokenizer's settings of no JSON": text("tokenizer_config.json", "{half"),
    "tokenizer's remote code": tokens(auto_map={"AutoTokenizer": ["evil--code.Tokenizer", None]}, tokenizer_class="X"),
    "tokenizer's vocabulary from elsewhere": tokens(vocab="/etc/passwd", tokenizer_class="BertTokenizer"),
    "tokenizer's vocabulary by its setting": tokens(vocab_file="/etc/passwd"),
    "tokenizer of another class": tokens(tokenizer_class="BertTokenizer"),
    "tokenizer with a number beyond the model": text(
        "tokenizer.json", f'{{"normalizer": null, {WORDS} {{"count": 5000000, "a": 1}}}}}}'
    ),
    "tokenizer that panics": text(
        "tokenizer.json",
        f'{{"normalizer": {{"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, {WORDS} {{"a": 1}}}}}}',
    ),
    "tokenizer with more tokens than the model": tokens(
        added_tokens_decoder={}, extra_special_tokens=[f"<{i}>" for i in range(99)]
    ),
}
ADAPTERS = {
    **MANIFESTS,
    "flipped byte": flip(ADAPTER),
    "truncated file": cut(ADAPTER),
    "file gone": gone(ADAPTER),
    "link in a file's place": link(ADAPTER),
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
    "layers swapped": holds(ADAPTER, renamed(".1.", ".2.")),
    "huge shape": header(ADAPTER, entry(UP, shape=[2**40, 2**20])),
    "bytes that overlap": header(ADAPTER, alias),
}
LORAS = {
    "LoRA denied": states(lora=None),
    "another rank": states(lora={**FORM, "rank": 4}),
    "a huge rank": states(lora={**FORM, "rank": 10**6}),
    "a rank above a matrix's": both(states(lora={**FORM, "rank": 17}), peft(r=17)),
    "another alpha": states(lora={**FORM, "alpha": 6.0}),
    "alpha that is no number": replaces('"alpha": 5.0', '"alpha": NaN'),
    "alpha of zero": states(lora={**FORM, "alpha": 0}),
    "alpha beyond numbers": both(states(lora={**FORM, "alpha": 1e300}), peft(lora_alpha=1e300)),
    "other layers": states(layers=[1]),
    "the adapter layers, it says": both(
        states(lora={**FORM, "layers": "adapter"}, layers=[1]), peft(layers_to_transform=[1])
    ),
    "a harmonizer's place": both(states(layers=[0, 1, 2, 3]), peft(layers_to_transform=[0, 1, 2, 3])),
    "the attention, it says": states(lora={**FORM, "modules": "attention"}),
    "modules that are none": states(lora={**FORM, "modules": "lm_head"}),
    "more in it": states(lora={**FORM, "dora": True}),
    "another model": holds(FACTORS, renamed("model.layers.", "transformer.h.")),
    "other matrices": holds(FACTORS, renamed("self_attn.q_proj", "mlp.q_proj")),
    "LoRA of the head": holds(FACTORS, put("base_model.model.lm_head.lora_A.weight", torch.ones(3, 32))),
    "a factor gone": holds(FACTORS, put(f"{Q}.lora_B.weight", None)),
    "a factor transposed": holds(FACTORS, put(f"{Q}.lora_A.weight", torch.ones(32, 3))),
    "another dtype": holds(FACTORS, put(f"{Q}.lora_A.weight", torch.ones(3, 32, dtype=torch.float16))),
    "too large for numbers": holds(FACTORS, lambda ts: {k: torch.full_like(t, 1e30) for k, t in ts.items()}),
    "layers swapped": holds(FACTORS, renamed(".1.", ".2.")),
    "NaN": holds(FACTORS, filled(f"{Q}.lora_A.weight", float("nan"))),
    "configuration gone": gone(PEFT_CONFIG),
    "configuration that is a list": text(PEFT_CONFIG, "[]"),
    "configuration nested deeply": text(PEFT_CONFIG, DEEP),
    "other modules": peft(target_modules=["embed_tokens"]),
    "modules to save": peft(modules_to_save=["lm_head"]),
    "code to map": peft(auto_mapping={"base_model_class": "evil", "parent_library": "evil"}),
    "another kind of adapter": peft(peft_type="EVIL"),
    "other weights at the start": peft(init_lora_weights="pissa"),
    "a setting of tomorrow": peft(evil="https://evil.example"),
}


# --- every one of them is refused ------------------------------------------------------------------------


def refuses(folder, *command):
    """One line, soon, and nothing is written."""
    before, start = snapshot(folder.parent), time.process_time()
    line = refused(*command)
    seconds = time.process_time() - start
    assert snapshot(folder.parent) == before and seconds < SECONDS, seconds
    assert len(line) < 600 and line.isprintable(), line


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    """A sound package, two sound adapters, the real model and a record."""
    folder = tmp_path_factory.mktemp("sound")
    package = Package(write_package(folder / "package", tiny_model("llama"), tokenizer))
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, lora in (("full", None), ("lora", LORA)):
        write_adapter(folder / name, package.load(CPU), lora, package)
    (folder / "records.jsonl").write_text('{"prompt": "count", "completion": " to one"}\n' * 9)
    return folder


def copied(sound, tmp_path, name):
    """A copy of what is sound, alone in a folder."""
    return shutil.copytree(sound / name, tmp_path / "given" / name)


@pytest.mark.parametrize("case", PACKAGES)
def test_malformed_package_is_refused(sound, tmp_path, case):
    folder = copied(sound, tmp_path, "package")
    PACKAGES[case](folder)
    refuses(folder, "tune", folder, "--data", sound / "records.jsonl", "--out", folder.parent / "out", "--threads", 1)


@pytest.mark.parametrize("case", ADAPTERS)
def test_malformed_adapter_is_refused(sound, tmp_path, case):
    folder = copied(sound, tmp_path, "full")
    ADAPTERS[case](folder)
    refuses(folder, "check", folder, "--package", sound / "package")
    refuses(folder, "plug", sound / "model", folder, "--package", sound / "package", "--out", folder.parent / "out")


@pytest.mark.parametrize("case", LORAS)
def test_malformed_lora_adapter_is_refused(sound, tmp_path, case):
    folder = copied(sound, tmp_path, "lora")
    LORAS[case](folder)
    refuses(folder, "check", folder, "--package", sound / "package")


@pytest.mark.parametrize("name", ["package", "full", "lora"])
def test_what_is_not_damaged_is_not_refused(sound, tmp_path, name):
    folder = copied(sound, tmp_path, name)
    assert scaleot("inspect", folder).code == 0
    tune = ("tune", folder, "--data", sound / "records.jsonl", "--out", tmp_path / "out", "--threads", 1, "--epochs", 1)
    assert scaleot(*(tune if name == "package" else ("check", folder, "--package", sound / "package"))).code == 0


# --- what the code never does ----------------------------------------------------------------------------


FORBIDDEN = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib.load",
    "marshal",
    "shelve",
    "eval",
    "exec",
    "torch.load",
}


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
    calls = [(name, node) for name, node in nodes() if isinstance(node, ast.Call)]
    asked = [
        (name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for name, node in calls
        if ast.unparse(node.func).endswith("from_pretrained")
        and ast.unparse(node.func) != "PeftModel.from_pretrained"  # which reads an adapter that we wrote
    ]
    ours = [options for name, options in asked if name != "embedded.py"]  # whose file is of a known hash
    assert len(ours) > 3 and all(options["trust_remote_code"] == "False" for options in ours)
    assert all(options.get("trust_remote_code", "False") == "False" for _, options in asked)
