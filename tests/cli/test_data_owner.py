"""The data owner's commands, tune and inspect, and what a command line that can't be meant ends in."""

import copy
import json
import os
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
from helpers import (
    PLAN,
    ROOT,
    dies_after,
    gives,
    piqa_rows,
    plan_of,
    plan_of_kinds,
    refused,
    scaleot,
    snapshot,
    tiny_model,
    write_package,
)
from typer.models import OptionInfo

from scaleot_core.cli import data_owner
from scaleot_core.cli.options import option_name
from scaleot_core.common.tensors import read_tensors
from scaleot_core.common.validation import Block
from scaleot_core.params import Params
from scaleot_core.settings import LoraForm, Machine, OffsiteTuning
from scaleot_core.tuning import tuner

COMMANDS = ["pack", "inspect", "tune", "audit", "check", "plug", "trace"]
FEW = ("--epochs", 2, "--threads", 1, "--device", "cpu")
LAYERS = ("--adapters", "layers", *FEW)
LORA = ("--lora-rank", 3, *FEW)  # of the 16 rows of a key


@pytest.fixture(scope="module")
def package(tmp_path_factory, tokenizer):
    return write_package(tmp_path_factory.mktemp("package") / "package", tiny_model("llama"), tokenizer)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [{"prompt": f"count to {i}", "completion": f" one to {i}"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, package, records):
    """Return an adapter of whole layers."""
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    gives("tune", package, "--data", records, "--out", out, *LAYERS)
    return out


@pytest.fixture(scope="module")
def lora(tmp_path_factory, package, records):
    """Return an adapter of LoRA in every matrix that the package has."""
    out = tmp_path_factory.mktemp("lora") / "lora"
    gives("tune", package, "--data", records, "--out", out, *LORA)
    return out


# --- the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command):
    ended = scaleot(*command.split(), "--help")
    assert ended.code == 0 and "Usage: scaleot" in ended.out
    assert "owner" in ended.out or command == "inspect"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_without_its_arguments_says_what_is_missing(command):
    line = refused(command, *(["x"] if command == "check" else []))
    assert " is missing; `scaleot " in line and "--help`" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "--epochs = 0: Input should be greater than or equal to 1; the least is 1"),
        (("--validation", 1.5), "--validation = 1.5: Input should be less than or equal to 1; the range is 0 to 1"),
        (("--batch-size", "abc"), "--batch-size = abc: Input should be a valid integer; the least is 1"),
        (("--lr", "abc"), "--lr = abc: Input should be a valid number; `scaleot tune --help` lists"),
        (("--adapters", "all"), "--adapters = all: it is not one of 'layers', 'lora'; `scaleot tune --help` lists"),
        (("--thread", 2), "--thread is no option; is --threads meant?"),
        (("more",), "Got unexpected extra argument"),
        (("--lr",), "Option '--lr' requires an argument; "),
        (("--lr", 5), "--lr = 5.0: Input should be less than or equal to 1; the range is above 0, at most 1"),
        (("--lora-alpha", -1.0), "--lora-alpha = -1.0: Input should be greater than 0; the range is above 0"),
        (("--delta", 1), "--delta = 1.0: Input should be less than 1; the range is above 0, below 1"),
        (("--threads", 100_000), "--threads = 100000: Input should be less than or equal to 1024; the range is 0 to"),
        (("--task", "piqaa"), "error: --task: 'piqaa' is no task of lm-eval; did you mean piqa"),
    ],
)
def test_option_that_cannot_be_meant_is_named_in_one_line(tmp_path, package, arguments, message):
    source = () if "--task" in arguments else ("--data", "x")
    assert message in refused("tune", package, *source, "--out", tmp_path / "out", *arguments)
    assert not os.listdir(tmp_path)


def test_command_that_is_none_is_refused_and_no_command_is_answered_with_the_help():
    assert "No such command 'tun'. Did you mean 'tune'? `scaleot --help`" in refused("tun")
    ended = scaleot()
    assert ended.code == 2 and "Usage: scaleot" in "".join([*ended.said, ended.out])


@pytest.mark.slow
def test_tune_needs_no_dvc_no_git_and_no_heavy_import_for_help(tmp_path, package, records):
    blocked = "import sys\nfor name in ('dvc', 'gguf', 'matplotlib', 'opacus'): sys.modules[name] = None\n"
    script = blocked + "from scaleot_core import cli\nassert 'torch' not in sys.modules\ncli.main()"
    command = [sys.executable, "-c", script, "tune", package, "--data", records, "--out", tmp_path / "out", *FEW]
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "manifest.json").is_file()


SETTINGS = {  # of `tune`, each with the class that describes it
    **{name: OffsiteTuning for name in ("epochs", "batch_size", "lr", "validation_fraction", "patience")},
    **{name: OffsiteTuning for name in ("max_grad_norm", "epsilon", "delta")},
    **{name: LoraForm for name in ("rank", "alpha", "modules")},
    **{name: Params for name in ("seed", "device", "threads")},
    "quantize": Machine,
}


def options_of_tune() -> dict[str, OptionInfo]:
    """Return every option of `tune`, by the name that a person types."""
    hints = get_type_hints(data_owner.tune, include_extras=True)
    metadata = {f"--{name.replace('_', '-')}": getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: info for name, infos in metadata.items() for info in infos if isinstance(info, OptionInfo)}


@pytest.mark.parametrize(("name", "block"), SETTINGS.items())
def test_option_that_is_a_setting_is_described_and_limited_as_its_field(name: str, block: type[Block]) -> None:
    option, field = options_of_tune()[option_name(name)], block.model_fields[name]
    assert field.description and (option.help or "").lower().startswith(f"{field.description}.".lower())
    least, most = ([getattr(m, name) for m in field.metadata if hasattr(m, name)] or [None] for name in ("ge", "le"))
    assert ([option.min], [option.max]) == (least, most)


def test_every_option_that_is_a_setting_is_among_those_above() -> None:
    others = {"seed", "device", "threads", "quantize"}
    fields = OffsiteTuning.model_fields.keys() | LoraForm.model_fields.keys() | others
    assert {name for name in fields if option_name(name) in options_of_tune()} == SETTINGS.keys()


@pytest.mark.parametrize("out", [".", "/", ".."])
def test_output_that_is_no_new_name_is_one_line(package, records, out):
    assert "is there already; name another" in refused("tune", package, "--data", records, "--out", out)


# --- inspect ---------------------------------------------------------------------------------------------


def test_inspect_says_what_a_package_is(package):
    shown = gives("inspect", package)
    assert (shown["architecture"], shown["dtype"]) == ("llama", "float32")
    assert [layer["kind"] for layer in shown["layers"]] == [layer.kind for layer in PLAN]
    tensors = [t for file in package.glob("*.safetensors") for t in read_tensors(file).values()]
    assert shown["parameters"] == sum(tensor.numel() for tensor in tensors)
    sizes = {name: entry["bytes"] for name, entry in shown["files"].items()}
    assert sizes == {f.name: f.stat().st_size for f in package.iterdir() if f.name != "manifest.json"}


def test_inspect_says_what_records_a_package_takes(tmp_path, package, tokenizer):
    shown = gives("inspect", package)
    assert shown["context in tokens"] == 128 and shown["chat template"] is False
    chatty = copy.deepcopy(tokenizer)
    system = "{% if m.role != 'system' %}"
    chatty.chat_template = (
        f"{{% for m in messages %}}{system}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}{{{{ tools }}}}"
    )
    chat = write_package(tmp_path / "chat", tiny_model("llama"), chatty)
    shown = gives("inspect", chat, "--render")
    assert shown["chat template"] is True
    assert shown["chat template renders"] == {"system messages": False, "tools": True, "calls of tools": False}
    table = scaleot("inspect", chat, "--render").out
    assert "system messages: no" in table and shown["files"]["adapter.safetensors"]["sha256"][:20] not in table


def test_inspect_says_what_an_adapter_is(adapter, lora, package):
    shown = gives("inspect", adapter)
    assert shown["tuned on package"] == gives("inspect", package)["id"] and shown["layers"] == [1]
    assert shown["whole"] is True and "sound" not in shown
    assert shown["adapters"] == "whole adapter layers" and shown["tuning: lr"] == 3e-4
    shown = gives("inspect", lora)
    assert shown["adapters"] == "LoRA of rank 3 in all matrices of all layers" and shown["layers"] == [1, 2, 3]
    assert shown["tuning: lr"] == 1e-3


def test_tables_say_the_same_to_a_person(adapter, package):
    for path in (adapter, package):
        ended = scaleot("inspect", path)
        assert ended.code == 0 and gives("inspect", path)["id"][:40] in ended.out.replace("\n", "")


# --- tune ------------------------------------------------------------------------------------------------


def test_adapter_is_all_that_goes_back(adapter, records):
    assert sorted(f.name for f in adapter.iterdir()) == ["adapter.safetensors", "manifest.json"]
    text = (adapter / "manifest.json").read_text()
    assert "count" not in text and str(records) not in text and "loss" not in text
    private = json.loads(adapter.with_name("adapter.private.json").read_text())
    assert len(private["history"]) > 0 and len(private["validation_loss"]) > 0
    assert sorted(f.name for f in adapter.parent.iterdir()) == ["adapter", "adapter.private.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_killed_tuning_goes_on_to_the_same_bytes(tmp_path, package, records, monkeypatch, kind):
    arguments = ("tune", package, "--data", records, "--adapters", kind, *LORA)
    gives(*arguments, "--out", tmp_path / "whole")
    monkeypatch.setattr(data_owner, "PROGRESS_SECONDS", 0.0)
    with dies_after(tuner, "answer_loss", 3):
        ended = scaleot(*arguments, "--out", tmp_path / "again")
    assert ended.code == 130 and "goes on" in ended.said[-1] and not (tmp_path / "again").exists()
    ended = scaleot(*arguments, "--out", tmp_path / "again")
    assert ended.code == 0 and any("resuming after step" in line for line in ended.said)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "whole")
    assert not (tmp_path / ".again.progress").exists()


def test_tuning_that_is_begun_anew_says_so_and_leaves_nothing(tmp_path, package, records, monkeypatch):
    arguments = ("tune", package, "--data", records, "--out", tmp_path / "out", *LORA)
    monkeypatch.setattr(data_owner, "PROGRESS_SECONDS", 0.0)
    with dies_after(tuner, "answer_loss", 3):
        assert scaleot(*arguments).code == 130
    ended = scaleot(*arguments, "--seed", 1)
    assert ended.code == 0 and "other options, package or records than before: starting anew" in ended.said
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_private_tuning_states_its_epsilon_and_draws_what_no_one_can_guess(tmp_path, package, records, kind):
    command = ("tune", package, "--data", records, "--epsilon", 8, "--delta", 0.01, "--adapters", kind, *LORA)
    one, two = (gives(*command, "--out", tmp_path / name) for name in ("one", "two"))
    assert 7 < one["epsilon"] <= 8 and one["epsilon"] == two["epsilon"]
    stated = json.loads((tmp_path / "one" / "manifest.json").read_text())["tuning"]["privacy"]
    assert stated == {"epsilon": 8.0, "delta": 0.01}  # what was asked for: what was spent would tell the count
    file = "adapter.safetensors" if kind == "layers" else "adapter_model.safetensors"
    first, second = (read_tensors(tmp_path / name / file) for name in ("one", "two"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert gives("inspect", tmp_path / "one")["tuning: privacy"] == stated


def test_tune_says_that_its_losses_are_not_the_real_models(tmp_path, package, records):
    ended = scaleot("tune", package, "--data", records, "--out", tmp_path / "out", *LORA)
    assert ended.code == 0 and "not of the real model" in ended.said[-1]
    rows = [row.split("│")[1].strip() for row in ended.out.splitlines() if row.count("│") == 3]
    assert {"send back", "keep", "records tuned on", "records held out"} <= set(rows)
    assert not {"adapter", "private"} & set(rows)


def test_package_without_adapter_layers_takes_lora(tmp_path, tokenizer, records):
    model = tiny_model("llama")
    package = write_package(tmp_path / "package", model, tokenizer, plan_of(model, plan_of_kinds(["compressed"] * 4)))
    command = ("tune", package, "--data", records, "--out", tmp_path / "out")
    assert "tune it with `lora`" in refused(*command, *LAYERS)
    assert "the rank is at most 16" in refused(*command, "--lora-rank", 17, *FEW)
    gives(*command, *LORA, "--lora-modules", "attention")
    assert gives("inspect", tmp_path / "out")["layers"] == [0, 1, 2, 3]


def test_tune_says_how_many_records_there_were_and_what_of_them_is_not_learnt(tmp_path, package):
    rows = [{"prompt": "far " * 100, "completion": " a", "id": 1}, *[{"prompt": "b", "completion": "c"}] * 4]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ended = scaleot("tune", package, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "out", *LORA, "--json")
    counts = json.loads(ended.out)
    assert counts["records"] == counts["examples"] == 5
    assert counts["records cut"] == 1 and counts["tokens cut"] > 200 and counts["fields ignored"] == {"id": 1}
    assert counts["answers left out"] == counts["answers reworded"] == counts["answers switched off"] == 0
    assert (counts["records tuned on"], counts["records held out"]) == (4, 1)
    assert any("1 of 5 records are too long" in line for line in ended.said)
    assert any("fields that are not read" in line and "`id`" in line for line in ended.said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "completion": "b"}, (), "1 record can't be parted"),
        (
            {"text": "short"},
            (),
            "1 block of 128 tokens can't be parted into some to tune on and some to hold out; lower",
        ),
        ({"prompt": "a", "completion": "b"}, ("--lr", 1e-3, "--lr", 1e-4), "add --patience 0 and one --lr alone"),
    ],
)
def test_too_few_records_to_hold_some_out_end_in_a_line_whose_options_help(tmp_path, package, row, options, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    command = ("tune", package, "--data", tmp_path / "a.jsonl")
    line = refused(*command, "--out", tmp_path / "no", *options, *LORA)
    assert message in line and "--patience 0" in line and ("--block-size" in line) == ("text" in row)
    for i, way in enumerate((("--patience", 0), ("--validation", 0))):
        assert gives(*command, "--out", tmp_path / f"out{i}", *way, *LORA)["steps"] == 2


def test_validation_of_nothing_holds_nothing_out(tmp_path, package, records):
    answer = gives("tune", package, "--data", records, "--out", tmp_path / "a", "--validation", 0, *LORA)
    assert answer["held-out loss"] == {} and answer["steps"] == 2 * 3  # 20 records in batches of 8


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_questions_of_a_task_come_in_the_same_files(tmp_path, package, name):
    rows = piqa_rows(12)
    lines = "\ufeff" + "\r\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(json.dumps(rows, indent=1) if name == "train.json" else lines, encoding="utf-8")
    command = ("tune", package, "--task", "piqa", "--data", tmp_path / name, "--out", tmp_path / "out")
    assert gives(*command, *LORA)["records"] == 12
    audit = ("audit", tmp_path / "out", "--package", package)
    assert "may be sent" in gives(*audit, "--task", "piqa", "--data", tmp_path / name, "--max-unmoved", 1)
    assert "--task" in refused(*audit)


def test_tune_needs_something_to_tune_on(tmp_path, package):
    assert "nothing to tune on" in refused("tune", package, "--out", tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no record" in refused("tune", package, "--data", tmp_path / "empty.jsonl", "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == ["empty.jsonl"]


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (("--epsilon", 8, "--delta", 0.5), "--delta = 0.5: above one over the 20 examples"),
        (("--epsilon", 8, "--patience", 1), "--epsilon = 8.0: with it held-out examples can't choose"),
        (("--lr", 1e-3, "--lr", 1e-4, "--validation", 0), "--validation = 0.0: several learning rates are compared"),
    ],
)
def test_options_that_contradict_each_other_are_named_as_typed(tmp_path, package, records, options, start):
    line = refused("tune", package, "--data", records, "--out", tmp_path / "out", *FEW, *options)
    assert line.startswith(f"error: {start}") and not os.listdir(tmp_path)
