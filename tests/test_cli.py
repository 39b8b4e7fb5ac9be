"""The two parties at their commands: packed, inspected, tuned, checked, plugged in, each from files alone."""

import copy
import json
import os
import shutil
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
import yaml
from helpers import (
    PLAN,
    ROOT,
    close,
    dies_after,
    logits,
    piqa_rows,
    pruned_emulator,
    refused,
    scaleot,
    snapshot,
    tiny_model,
    write_package,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.models import OptionInfo

from scaleot_core.cli import data_owner
from scaleot_core.cli.options import option_name
from scaleot_core.common.files import write_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.common.validation import Block
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.exchange.manifest import manifest_sha256
from scaleot_core.exchange.package import save
from scaleot_core.params import Params, load_params
from scaleot_core.pipeline import read_entry
from scaleot_core.settings import LoraForm, Machine, OffsiteTuning
from scaleot_core.tuning import tuner
from scaleot_core.tuning.adapters import TunedLayers, plug_in

COMMANDS = ["pack", "inspect", "tune", "check", "plug"]


def gives(*arguments):
    """What a command says in JSON."""
    ended = scaleot(*arguments, "--json")
    assert ended.code == 0, ended.said
    return json.loads(ended.out)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """The real model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory, tokenizer):
    return write_package(tmp_path_factory.mktemp("package") / "package", tiny_model("llama"), tokenizer)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [{"prompt": f"count to {i}", "completion": f" one to {i}"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


FEW = ("--epochs", 2, "--threads", 1, "--device", "cpu")


WHOLE = ("--adapters", "layers")
RANK = ("--lora-rank", 3)  # of the 16 rows of a key


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, package, records):
    """Of whole layers."""
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    gives("tune", package, "--data", records, "--out", out, *WHOLE, *FEW)
    return out


@pytest.fixture(scope="module")
def lora(tmp_path_factory, package, records):
    """Of LoRA in every matrix that is there."""
    out = tmp_path_factory.mktemp("lora") / "lora"
    gives("tune", package, "--data", records, "--out", out, *RANK, *FEW)
    return out


@pytest.fixture(scope="module")
def pruned_package(tmp_path_factory, tokenizer):
    """A package without an adapter layer that keeps some feed-forward channels, and beside it what its owner knows."""
    folder = tmp_path_factory.mktemp("pruned") / "package"
    folder.mkdir()
    emulator, plan, kept, real = pruned_emulator("llama", beta=0.8, adapter_layer=False)
    save(folder, real.config, tokenizer, plan, package_tensors(emulator, plan))
    channels = {str(i): those.tolist() for i, those in kept.items()}
    write_json(folder.with_name("package.private.json"), {"package": manifest_sha256(folder), "channels": channels})
    return folder


@pytest.fixture(scope="module")
def pruned_lora(tmp_path_factory, pruned_package, records):
    out = tmp_path_factory.mktemp("pruned-lora") / "lora"
    gives("tune", pruned_package, "--data", records, "--out", out, "--lora-rank", 3, "--lr", 0.01, *FEW)
    return out


# --- what an outsider sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command):
    ended = scaleot(*command.split(), "--help")
    assert ended.code == 0 and "Usage: scaleot" in ended.out
    assert "owner" in ended.out or command == "inspect"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_without_its_arguments_says_what_is_missing(command):
    said = refused(command, *(["x"] if command == "check" else []))
    assert " is missing; `scaleot " in said and "--help`" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
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
        (("--delta", 1), "--delta = 1.0: Input should be less than 1; the range is above 0, below 1"),
        (("--threads", 100_000), "--threads = 100000: Input should be less than or equal to 1024; the range is 0 to"),
    ],
)
def test_command_line_that_cannot_be_meant_ends_in_one_line(tmp_path, arguments, said):
    assert said in refused("tune", "p", "--data", "x", "--out", tmp_path / "out", *arguments)


def test_command_that_is_none_is_refused_and_no_command_is_answered_with_the_help():
    assert "No such command 'tun'. Did you mean 'tune'? `scaleot --help`" in refused("tun")
    ended = scaleot()
    assert ended.code == 2 and "Usage: scaleot" in "".join([*ended.said, ended.out])


@pytest.mark.slow
def test_commands_that_read_only_need_no_dvc_no_git_and_no_heavy_import_for_help(tmp_path, package, records):
    blocked = "import sys\nfor name in ('dvc', 'gguf', 'matplotlib', 'opacus'): sys.modules[name] = None\n"
    script = blocked + "from scaleot_core import cli\nassert 'torch' not in sys.modules\ncli.main()"
    command = [sys.executable, "-c", script, "tune", package, "--data", records, "--out", tmp_path / "out", *FEW]
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
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
    """Every option of `tune`, by the name that a person types."""
    hints = get_type_hints(data_owner.tune, include_extras=True)
    metadata = {f"--{name.replace('_', '-')}": getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: info for name, infos in metadata.items() for info in infos if isinstance(info, OptionInfo)}


@pytest.mark.parametrize(("name", "block"), SETTINGS.items())
def test_option_that_is_a_setting_is_described_and_limited_as_its_field(name: str, block: type[Block]) -> None:
    option, field = options_of_tune()[option_name(name)], block.model_fields[name]
    assert field.description and (option.help or "").lower().startswith(f"{field.description}.".lower())
    least, most = ([getattr(m, name) for m in field.metadata if hasattr(m, name)] or [None] for name in ("ge", "le"))
    assert ([option.min], [option.max]) == (least, most)


def test_no_option_of_a_setting_goes_unheld() -> None:
    """An option that is new has to be among those above."""
    fields = (
        OffsiteTuning.model_fields.keys() | LoraForm.model_fields.keys() | {"seed", "device", "threads", "quantize"}
    )
    assert {name for name in fields if option_name(name) in options_of_tune()} == SETTINGS.keys()


# --- pack ------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, package):
    """What the pipeline leaves of a plan, where α = 0.33 and β = 0.8."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values |= {"alpha": 0.33, "beta": 0.8, "adapter_layers": 1}
    values["harmonizer"]["rank"] = 8
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(package, tmp_path / "artifacts" / "emulator")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    params = read_entry("compress", file=tmp_path / "dvc.yaml").values(load_params(tmp_path / "params.yaml"))
    private = {"scores": [0.0, 3.0, 2.0, 1.0], "params": params, "channels": {"2": [0, 1]}}
    write_json(tmp_path / "artifacts" / "emulator.private.json", private)
    return tmp_path


@pytest.mark.parametrize("name", ["shipped", "shipped.zip"])
def test_pack_ships_the_package_and_keeps_the_scores(project, package, name):
    out = project / name
    found = gives("pack", "--project", project, "--out", out, "--license", "for tests alone")
    shown = gives("inspect", out)
    assert shown["license"] == "for tests alone" and shown["id"] == found["id"] and shown["sound"] is True
    private = json.loads((project / f"{name}.private.json").read_text())
    assert private["package"] == found["id"] and private["scores"] == [0.0, 3.0, 2.0, 1.0]
    assert private["params"]["alpha"] == 0.33 and private["channels"] == {"2": [0, 1]}
    text = "".join(f.read_text() for f in out.glob("*.json")) if out.is_dir() else out.read_bytes().decode("latin1")
    assert not [word for word in ("scores", "channels", "alpha", "train_blocks", str(project)) if word in text]


def test_pack_of_int8_is_smaller_and_goes_all_the_way(tmp_path, project, base, records):
    """Packed, tuned, checked, plugged in."""
    shipped = project / "small.zip"
    gives("pack", "--project", project, "--out", project / "whole.zip", "--license", "for tests alone")
    found = gives("pack", "--project", project, "--out", shipped, "--quantize", "int8", "--license", "for tests alone")
    shown = gives("inspect", shipped)
    assert (shown["license"], shown["quantized"], shown["id"]) == ("for tests alone", "int8", found["id"])
    assert shown["bytes"] < gives("inspect", project / "whole.zip")["bytes"]
    assert json.loads((project / "small.zip.private.json").read_text())["package"] == found["id"]
    gives("tune", shipped, "--data", records, "--out", tmp_path / "lora", *RANK, *FEW, "--quantize", "int8")
    gives("plug", base, tmp_path / "lora", "--package", shipped, "--out", tmp_path / "plugged")
    with torch.no_grad():
        tuned, real = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "plugged", base))
    assert not torch.equal(logits(tuned), logits(real))


def test_pack_keeps_what_was_measured_of_the_package_and_of_no_other(project, package):
    shipped = manifest_sha256(package)
    write_json(project / "metrics.json", {"emulator": {"package": shipped}, "tasks": {}})
    write_json(project / "attack.json", {"package": "another", "weights": {}})
    gives("pack", "--project", project, "--out", project / "shipped")
    measured = json.loads((project / "shipped.private.json").read_text())["measured"]
    assert measured == {"metrics.json": {"emulator": {"package": shipped}, "tasks": {}}}
    assert not [f for f in (project / "shipped").glob("*.json") if "measured" in f.read_text()]


def test_pack_refuses_what_params_no_longer_describes(project):
    values = yaml.safe_load((project / "params.yaml").read_text())
    for change in ({"alpha": 0.9}, {"beta": 0.5}):
        (project / "params.yaml").write_text(yaml.safe_dump(values | change))
        assert "dvc repro" in refused("pack", "--project", project, "--out", project / "out")
    assert not (project / "out").exists() and not (project / "out.private.json").exists()


def test_archive_has_the_same_bytes_each_time_and_is_read_like_the_folder(project, package):
    for name in ("one.zip", "two.zip", "folder"):
        gives("pack", "--project", project, "--out", project / name)
    assert (project / "one.zip").read_bytes() == (project / "two.zip").read_bytes()
    one, folder = gives("inspect", project / "one.zip"), gives("inspect", project / "folder")
    assert {**one, "path": 0} == {**folder, "path": 0}


@pytest.fixture
def metrics(project):
    """What stage evaluate would have written, as far as it is told to the data owner."""
    file = project / "metrics.json"
    recovery = {"lora": {"acc": 0.85, "answer_nll": 0.94}, "layers": {"acc": None, "answer_nll": 0.77}}
    told = {kind: {"recovery": figures, "plug_in": {"acc": 0.5}} for kind, figures in recovery.items()}
    identity = manifest_sha256(project / "artifacts" / "emulator")
    write_json(file, {"emulator": {"package": identity}, "tasks": {"piqa": {"adapters": told}}})
    return file


def test_owner_may_tell_the_recovery_that_it_measured(project, metrics):
    gives("pack", "--project", project, "--out", project / "told", "--figures", metrics)
    shown = gives("inspect", project / "told")["recovery, as its owner measured it"]
    assert shown["piqa, lora"] == {"acc": 0.85, "answer_nll": 0.94} and shown["piqa, layers"]["acc"] is None
    assert "0.94" in scaleot("inspect", project / "told").out
    gives("pack", "--project", project, "--out", project / "silent")
    assert "recovery, as its owner measured it" not in gives("inspect", project / "silent")
    found = json.loads(metrics.read_text())
    write_json(metrics, {**found, "emulator": {"package": "0" * 64}})
    command = ("pack", "--project", project, "--out", project / "other", "--figures", metrics)
    assert "another package" in refused(*command)
    write_json(metrics, {"tasks": {}})
    assert "no metrics.json" in refused(*command)
    assert not (project / "other").exists()


# --- inspect ---------------------------------------------------------------------------------------------


def test_inspect_says_what_a_package_is(package):
    shown = gives("inspect", package)
    assert shown["architecture"] == "llama" and shown["dtype"] == "float32" and shown["layers"] == list(PLAN.kinds)
    assert shown["parameters"] == sum(
        t.numel() for file in package.glob("*.safetensors") for t in read_tensors(file).values()
    )
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
    shown = gives("inspect", chat)
    assert shown["chat template"] is True
    assert shown["chat template renders"] == {"system messages": False, "tools": True, "calls of tools": False}
    table = scaleot("inspect", chat).out
    assert "system messages: no" in table and shown["files"]["adapter.safetensors"]["sha256"][:20] not in table


def test_inspect_says_what_an_adapter_is(adapter, package):
    shown = gives("inspect", adapter)
    assert shown["tuned on package"] == gives("inspect", package)["id"] and shown["layers"] == [1]
    assert shown["whole"] is True and "sound" not in shown
    assert shown["adapters"] == "whole adapter layers" and shown["tuning: lr"] == 3e-4


def test_inspect_says_where_lora_is(lora):
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


def test_tune_from_an_archive_into_an_archive(tmp_path, project, records):
    gives("pack", "--project", project, "--out", tmp_path / "p.zip")
    found = gives("tune", tmp_path / "p.zip", "--data", records, "--out", tmp_path / "a.zip", *RANK, *FEW)
    assert found["records"] == 20
    assert gives("check", tmp_path / "a.zip", "--package", tmp_path / "p.zip")["sound"] is True


def test_tune_on_a_tasks_questions(tmp_path, package):
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, piqa_rows(12))))
    assert (
        gives("tune", package, "--task", "piqa", "--data", file, "--out", tmp_path / "a", *RANK, *FEW)["records"] == 12
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_killed_tuning_goes_on_to_the_same_bytes(tmp_path, package, records, monkeypatch, kind):
    arguments = ("tune", package, "--data", records, "--adapters", kind, *RANK, *FEW)
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
    arguments = ("tune", package, "--data", records, "--out", tmp_path / "out", *RANK, *FEW)
    monkeypatch.setattr(data_owner, "PROGRESS_SECONDS", 0.0)
    with dies_after(tuner, "answer_loss", 3):
        assert scaleot(*arguments).code == 130
    ended = scaleot(*arguments, "--seed", 1)
    assert ended.code == 0 and "other options, package or records than before: starting anew" in ended.said
    assert sorted(os.listdir(tmp_path)) == ["out", "out.private.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_private_tuning_states_its_epsilon_and_draws_what_no_one_can_guess(tmp_path, package, records, kind):
    command = ("tune", package, "--data", records, "--epsilon", 8, "--delta", 0.01, "--adapters", kind, *RANK, *FEW)
    one, two = (gives(*command, "--out", tmp_path / name) for name in ("one", "two"))
    assert 7 < one["epsilon"] <= 8 and one["epsilon"] == two["epsilon"]
    stated = json.loads((tmp_path / "one" / "manifest.json").read_text())["tuning"]["privacy"]
    assert stated == {"epsilon": 8.0, "delta": 0.01}  # what was asked for: what was spent would tell the count
    file = "adapter.safetensors" if kind == "layers" else "adapter_model.safetensors"
    first, second = (read_tensors(tmp_path / name / file) for name in ("one", "two"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert gives("inspect", tmp_path / "one")["tuning: privacy"] == stated
    assert "held-out examples can't choose" in refused(*command, "--out", tmp_path / "out", "--patience", 1)


def test_tune_says_that_its_losses_are_not_the_real_models(tmp_path, package, records):
    ended = scaleot("tune", package, "--data", records, "--out", tmp_path / "out", *RANK, *FEW)
    assert ended.code == 0 and "not of the real model" in ended.said[-1]
    rows = [row.split("│")[1].strip() for row in ended.out.splitlines() if row.count("│") == 3]
    assert {"send back", "keep", "records tuned on", "records held out"} <= set(rows)
    assert not {"adapter", "private"} & set(rows)


def test_package_without_adapter_layers_takes_lora(tmp_path, pruned_package, records):
    command = ("tune", pruned_package, "--data", records, "--out", tmp_path / "out", *FEW)
    assert "tune it with `lora`" in refused(*command, *WHOLE)
    assert "the rank is at most 16" in refused(*command, "--lora-rank", 17)
    gives(*command, *RANK, "--lora-modules", "attention")
    assert gives("inspect", tmp_path / "out")["layers"] == [0, 1, 2, 3]


def test_tune_says_how_many_records_there_were_and_what_of_them_is_not_learnt(tmp_path, package):
    rows = [{"prompt": "far " * 100, "completion": " a", "id": 1}, *[{"prompt": "b", "completion": "c"}] * 4]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = gives("tune", package, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "out", *RANK, *FEW)
    assert found["records"] == found["examples"] == 5
    assert found["records cut"] == 1 and found["tokens cut"] > 200 and found["fields ignored"] == {"id": 1}
    assert found["answers left out"] == found["answers reworded"] == found["answers switched off"] == 0
    assert (found["records tuned on"], found["records held out"]) == (4, 1)
    ended = scaleot("tune", package, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "again", *RANK, *FEW)
    assert any("1 of 5 records are too long" in line for line in ended.said)
    assert any("fields that are not read" in line and "`id`" in line for line in ended.said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "options", "said"),
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
def test_too_few_records_to_hold_some_out_end_in_a_line_whose_options_help(tmp_path, package, row, options, said):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    command = ("tune", package, "--data", tmp_path / "a.jsonl")
    found = refused(*command, "--out", tmp_path / "no", *options, *RANK, *FEW)
    assert said in found and "--patience 0" in found and ("--block-size" in found) == ("text" in row)
    for i, way in enumerate((("--patience", 0), ("--validation", 0))):
        assert gives(*command, "--out", tmp_path / f"out{i}", *way, *RANK, *FEW)["steps"] == 2


def test_validation_of_nothing_holds_nothing_out(tmp_path, package, records):
    command = ("tune", package, "--data", records, "--out")
    found = gives(*command, tmp_path / "a", "--validation", 0, *RANK, *FEW)
    assert found["held-out loss"] == {} and found["steps"] == 2 * 3  # 20 records in batches of 8


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_questions_of_a_task_come_in_the_same_files(tmp_path, package, name):
    rows = piqa_rows(12)
    lines = "\ufeff" + "\r\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(json.dumps(rows, indent=1) if name == "train.json" else lines, encoding="utf-8")
    command = ("tune", package, "--task", "piqa", "--data", tmp_path / name, "--out", tmp_path / "out")
    assert gives(*command, *RANK, *FEW)["records"] == 12


def test_tune_needs_something_to_tune_on(tmp_path, package):
    assert "nothing to tune on" in refused("tune", package, "--out", tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no record" in refused("tune", package, "--data", tmp_path / "empty.jsonl", "--out", tmp_path / "out")
    assert "--lr = 5.0" in refused("tune", package, "--data", tmp_path / "x", "--out", tmp_path / "out", "--lr", 5)
    assert os.listdir(tmp_path) == ["empty.jsonl"]


@pytest.mark.slow
def test_parameter_is_told_as_the_option_that_sets_it(tmp_path, package, base, adapter, records):
    out = ("--out", tmp_path / "out", *FEW)
    assert refused("tune", package, "--task", "piqaa", *out).startswith("error: --task: 'piqaa' is no task of lm-eval")
    for option, value in (("--lr", 5.0), ("--lora-alpha", -1.0), ("--delta", 2.0)):
        said = refused("tune", package, "--data", "x", *out, option, value)
        assert said.startswith(f"error: {option} = {value}: ") and ("the range is" in said or "the least is" in said)
    told = refused("tune", package, "--data", records, *out, "--epsilon", 8, "--delta", 0.5)
    assert told.startswith("error: --delta = 0.5: above one over the 20 examples")
    assert refused("tune", package, "--data", records, *out, "--epsilon", 8, "--patience", 1).startswith(
        "error: --epsilon = 8.0: with it held-out examples can't choose"
    )
    rates = ("--lr", 1e-3, "--lr", 1e-4)
    assert refused("tune", package, "--data", records, *out, *rates, "--validation", 0).startswith(
        "error: --validation = 0.0: several learning rates are compared"
    )
    (tmp_path / "empty").mkdir()
    told = refused("plug", tmp_path / "empty", adapter, "--package", package, "--out", tmp_path / "out")
    assert told.startswith(f"error: BASE = '{tmp_path / 'empty'}': ") and not os.listdir(tmp_path / "empty")


def test_what_is_there_is_not_written_over(tmp_path, package, adapter, base, project):
    (tmp_path / "out").mkdir()
    for command in (
        ("pack", "--project", project),
        ("tune", package, "--data", "x"),
        ("plug", base, adapter, "--package", package),
        ("plug", base, adapter, "--package", package, "--as-lora", tmp_path / "new"),
    ):
        assert "it is there already" in refused(*command, "--out", tmp_path / "out")


# --- check and plug --------------------------------------------------------------------------------------


def test_check_says_how_far_each_layer_moved(adapter, package):
    (moved,) = gives("check", adapter, "--package", package)["layer_changes"]
    before, after = read_tensors(package / "adapter.safetensors"), read_tensors(adapter / "adapter.safetensors")
    change = torch.cat([(after[name] - tensor).flatten() for name, tensor in before.items()])
    whole = torch.cat([tensor.flatten() for tensor in before.values()])
    assert moved["layer"] == 1 and moved["relative"] == pytest.approx(float(change.norm() / whole.norm()), rel=1e-5)
    peaks = [(after[name] - t).abs().max() / (after[name] - t).square().mean().sqrt() for name, t in before.items()]
    assert moved["outlier"] == pytest.approx(float(max(peaks)), rel=1e-5)
    assert "relative change" in scaleot("check", adapter, "--package", package).out


def test_plug_in_is_a_plain_transformers_folder(tmp_path, base, adapter, package):
    gives("plug", base, adapter, "--package", package, "--out", tmp_path / "plugged")
    names = {f.name for f in (tmp_path / "plugged").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    expected = tiny_model("llama")
    plug_in(expected, PLAN, TunedLayers(read_tensors(adapter / "adapter.safetensors")))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plugged", dtype="auto", local_files_only=True)
    assert torch.equal(logits(loaded), logits(expected)) and not torch.equal(
        logits(loaded), logits(tiny_model("llama"))
    )
    AutoTokenizer.from_pretrained(tmp_path / "plugged", local_files_only=True)


def test_plugged_in_lora_is_what_peft_loads(tmp_path, base, package, lora):
    options = ("--package", package, "--out", tmp_path / "plugged", "--as-lora", tmp_path / "lora")
    gives("plug", base, lora, *options)
    plugged = AutoModelForCausalLM.from_pretrained(tmp_path / "plugged", dtype="auto", local_files_only=True)
    for folder in (lora, tmp_path / "lora"):
        real = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
        close(logits(PeftModel.from_pretrained(real, folder)), logits(plugged))
    assert not torch.equal(logits(plugged), logits(tiny_model("llama")))
    assert sorted(os.listdir(tmp_path / "lora")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_lora_over_some_of_the_channels_needs_what_its_owner_kept(tmp_path, base, pruned_package, pruned_lora):
    command = ("plug", base, pruned_lora, "--package", pruned_package)
    gives(*command, "--out", tmp_path / "plugged", "--as-lora", tmp_path / "lora")
    plugged = AutoModelForCausalLM.from_pretrained(tmp_path / "plugged", dtype="auto", local_files_only=True)
    real = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    close(logits(PeftModel.from_pretrained(real, tmp_path / "lora")), logits(plugged))
    shutil.copytree(pruned_package, tmp_path / "package")
    command = ("plug", base, pruned_lora, "--package", tmp_path / "package", "--out", tmp_path / "out")
    assert "--private" in refused(*command)
    kept = pruned_package.with_name("package.private.json")
    gives(*command, "--private", kept)
    other = tmp_path / "other.json"
    write_json(other, {**json.loads(kept.read_text()), "package": "0" * 64})
    assert "another package" in refused(*command[:-1], tmp_path / "out2", "--private", other)


def test_folders_of_which_one_would_replace_the_other_are_refused(tmp_path, base, package, lora):
    command = ("plug", base, lora, "--package", package)
    for out, as_lora in (("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "c/../a/b")):
        said = refused(*command, "--out", tmp_path / out, "--as-lora", tmp_path / as_lora)
        assert "--out and --as-lora: one is the other, or lies in it" in said


def test_plug_needs_something_to_write(tmp_path, base, adapter, package):
    assert "nothing to write" in refused("plug", base, adapter, "--package", package)
    said = refused("plug", base, adapter, "--package", package, "--as-lora", tmp_path / "lora")
    assert "no LoRA" in said and os.listdir(tmp_path) == []


def test_limits_refuse_an_adapter_that_moved_too_far(tmp_path, base, adapter, package):
    (moved,) = gives("check", adapter, "--package", package)["layer_changes"]
    command = ("plug", base, adapter, "--package", package, "--out", tmp_path / "out")
    assert "layer 1 has change" in refused(*command, "--max-change", moved["relative"] * 0.99)
    assert "layer 1 has outlier" in refused(*command, "--max-outlier", moved["outlier"] * 0.99)
    assert os.listdir(tmp_path) == []
    gives(*command, "--max-change", moved["relative"] * 1.01, "--max-outlier", moved["outlier"] * 1.01)


def test_outlier_that_is_too_large_for_its_square_is_refused(tmp_path, base, adapter, package):
    from helpers import list_again

    shutil.copytree(adapter, tmp_path / "poison")
    tensors = read_tensors(tmp_path / "poison" / "adapter.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e30
    write_tensors(tmp_path / "poison" / "adapter.safetensors", tensors)
    list_again(tmp_path / "poison", "adapter.safetensors")
    command = ("plug", base, tmp_path / "poison", "--package", package, "--out", tmp_path / "out")
    for limit in ("--max-change", "--max-outlier"):
        assert "the limit is 20" in refused(*command, limit, 20)


def test_license_that_no_one_could_read_back(project):
    said = refused("pack", "--project", project, "--out", project / "out", "--license", "x" * 1001)
    assert "1000 are the most" in said and not (project / "out").exists()


def test_one_poisoned_weight_is_an_outlier(tmp_path, adapter, package):
    from helpers import list_again

    shutil.copytree(adapter, tmp_path / "poison")
    tensors = read_tensors(tmp_path / "poison" / "adapter.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1.0
    write_tensors(tmp_path / "poison" / "adapter.safetensors", tensors)
    list_again(tmp_path / "poison", "adapter.safetensors")
    (clean,), (poisoned,) = (
        gives("check", folder, "--package", package)["layer_changes"] for folder in (adapter, tmp_path / "poison")
    )
    assert poisoned["outlier"] > 5 * clean["outlier"]


def test_base_that_the_package_was_not_made_from(tmp_path, adapter, package, tokenizer):
    other = tiny_model("llama")
    other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    said = refused("plug", tmp_path / "other", adapter, "--package", package, "--out", tmp_path / "out")
    assert "made from another model" in said and os.listdir(tmp_path) == ["other"]


def test_missing_paths(tmp_path, package, adapter, base):
    gone = tmp_path / "gone"
    for command in (
        ("inspect", gone),
        ("tune", gone, "--data", "x", "--out", tmp_path / "out"),
        ("tune", package, "--data", gone, "--out", tmp_path / "out"),
        ("check", gone, "--package", package),
        ("check", adapter, "--package", gone),
        ("plug", gone, adapter, "--package", package, "--out", tmp_path / "out"),
        ("pack", "--project", gone, "--out", tmp_path / "out"),
    ):
        assert "gone" in refused(*command), command
    assert os.listdir(tmp_path) == []
