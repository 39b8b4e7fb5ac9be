"""The two parties at their commands: packed, inspected, tuned, checked, plugged in, each from files alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import IDS, PLAN, ROOT, dies_after, piqa_rows, refused, scaleot, snapshot, tiny_model, write_package
from transformers import AutoModelForCausalLM, AutoTokenizer

from scaleot_core import cli
from scaleot_core.common.files import write_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.emulator import plug_in
from scaleot_core.params import load_params
from scaleot_core.pipeline import read_entry
from scaleot_core.tuning import tuner

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


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, package, records):
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    gives("tune", package, "--data", records, "--out", out, *FEW)
    return out


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- what an outsider sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command):
    ended = scaleot(*command.split(), "--help")
    assert ended.code == 0 and "Usage: scaleot" in ended.out
    assert "owner" in ended.out or command == "inspect"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_without_its_arguments_says_what_is_missing(command):
    ended = scaleot(command)
    assert ended.code == 2 and "Missing" in "".join(ended.said)


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


# --- pack ------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, package):
    """What the pipeline leaves of a plan, where α = 0.33 and β = 0.8."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values |= {"alpha": 0.33, "beta": 0.8, "adapter_layers": 1}
    values["harmonizer"]["rank"] = 8
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(package, tmp_path / "artifacts" / "emulator")
    shutil.copy(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    params = read_entry("compress", file=tmp_path / "dvc.yaml").values(load_params(tmp_path / "params.yaml"))
    private = {"scores": [0.0, 3.0, 2.0, 1.0], "params": params}
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
    assert private["params"]["alpha"] == 0.33
    text = "".join(f.read_text() for f in out.glob("*.json")) if out.is_dir() else out.read_bytes().decode("latin1")
    assert not [word for word in ("scores", "alpha", "train_blocks", str(project)) if word in text]


def test_pack_refuses_what_params_no_longer_describes(project):
    values = yaml.safe_load((project / "params.yaml").read_text())
    for change in ({"alpha": 0.9}, {"beta": 0.5}, {"distill": values["distill"] | {"steps": 7}}, {"dtype": "float16"}):
        (project / "params.yaml").write_text(yaml.safe_dump(values | change))
        assert "dvc repro" in refused("pack", "--project", project, "--out", project / "out")
    assert not (project / "out").exists() and not (project / "out.private.json").exists()


def test_archive_has_the_same_bytes_each_time_and_is_read_like_the_folder(project, package):
    for name in ("one.zip", "two.zip", "folder"):
        gives("pack", "--project", project, "--out", project / name)
    assert (project / "one.zip").read_bytes() == (project / "two.zip").read_bytes()
    one, folder = gives("inspect", project / "one.zip"), gives("inspect", project / "folder")
    assert {**one, "path": 0} == {**folder, "path": 0}


# --- inspect ---------------------------------------------------------------------------------------------


def test_inspect_says_what_a_package_is(package):
    shown = gives("inspect", package)
    assert shown["architecture"] == "llama" and shown["dtype"] == "float32" and shown["layers"] == list(PLAN.kinds)
    assert shown["parameters"] == sum(
        t.numel() for file in package.glob("*.safetensors") for t in read_tensors(file).values()
    )
    sizes = {name: entry["bytes"] for name, entry in shown["files"].items()}
    assert sizes == {f.name: f.stat().st_size for f in package.iterdir() if f.name != "manifest.json"}


def test_inspect_says_what_an_adapter_is(adapter, package):
    shown = gives("inspect", adapter)
    assert shown["tuned on package"] == gives("inspect", package)["id"] and shown["layers"] == [1]
    assert shown["whole"] is True and "sound" not in shown
    assert shown["tuned"] == "in full" and shown["tuning: lr"] == 3e-4


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
    found = gives("tune", tmp_path / "p.zip", "--data", records, "--out", tmp_path / "a.zip", *FEW)
    assert found["records"] == 20
    assert gives("check", tmp_path / "a.zip", "--package", tmp_path / "p.zip")["sound"] is True


def test_tune_on_a_tasks_questions(tmp_path, package):
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, piqa_rows(12))))
    assert gives("tune", package, "--task", "piqa", "--data", file, "--out", tmp_path / "a", *FEW)["records"] == 12


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_killed_tuning_goes_on_to_the_same_bytes(tmp_path, package, records, monkeypatch, peft):
    arguments = ("tune", package, "--data", records, "--peft", peft, *FEW)
    gives(*arguments, "--out", tmp_path / "whole")
    monkeypatch.setattr(cli, "PROGRESS_SECONDS", 0.0)
    with dies_after(tuner, "answer_loss", 3):
        ended = scaleot(*arguments, "--out", tmp_path / "again")
    assert ended.code == 130 and "goes on" in ended.said[-1] and not (tmp_path / "again").exists()
    ended = scaleot(*arguments, "--out", tmp_path / "again")
    assert ended.code == 0 and any("resuming after step" in line for line in ended.said)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "whole")
    assert not (tmp_path / ".again.progress").exists()


def test_private_tuning_states_its_epsilon_and_draws_what_no_one_can_guess(tmp_path, package, records):
    command = ("tune", package, "--data", records, "--epsilon", 8, "--delta", 0.01, *FEW)
    one, two = (gives(*command, "--out", tmp_path / name) for name in ("one", "two"))
    assert 7 < one["epsilon"] <= 8 and one["epsilon"] == two["epsilon"]
    stated = json.loads((tmp_path / "one" / "manifest.json").read_text())["tuning"]["privacy"]
    assert stated == {"epsilon": 8.0, "delta": 0.01}  # what was asked for: what was spent would tell the count
    first, second = (read_tensors(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert gives("inspect", tmp_path / "one")["tuning: privacy"] == stated
    assert "held-out examples can't choose" in refused(*command, "--out", tmp_path / "out", "--patience", 1)


def test_tune_needs_something_to_tune_on(tmp_path, package):
    assert "nothing to tune on" in refused("tune", package, "--out", tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no record" in refused("tune", package, "--data", tmp_path / "empty.jsonl", "--out", tmp_path / "out")
    assert "lr.0 = 5.0" in refused("tune", package, "--data", tmp_path / "x", "--out", tmp_path / "out", "--lr", 5)
    assert os.listdir(tmp_path) == ["empty.jsonl"]


def test_what_is_there_is_not_written_over(tmp_path, package, adapter, base, project):
    (tmp_path / "out").mkdir()
    for command in (
        ("pack", "--project", project),
        ("tune", package, "--data", "x"),
        ("plug", base, adapter, "--package", package),
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
    plug_in(expected, PLAN, read_tensors(adapter / "adapter.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plugged", dtype="auto", local_files_only=True)
    assert torch.equal(logits(loaded), logits(expected)) and not torch.equal(
        logits(loaded), logits(tiny_model("llama"))
    )
    AutoTokenizer.from_pretrained(tmp_path / "plugged", local_files_only=True)


def test_limits_refuse_an_adapter_that_moved_too_far(tmp_path, base, adapter, package):
    (moved,) = gives("check", adapter, "--package", package)["layer_changes"]
    command = ("plug", base, adapter, "--package", package, "--out", tmp_path / "out")
    assert "layer 1 has change" in refused(*command, "--max-change", moved["relative"] * 0.99)
    assert "layer 1 has outlier" in refused(*command, "--max-outlier", moved["outlier"] * 0.99)
    assert os.listdir(tmp_path) == []
    gives(*command, "--max-change", moved["relative"] * 1.01, "--max-outlier", moved["outlier"] * 1.01)


def test_outlier_that_is_too_large_for_its_square_is_refused(tmp_path, base, adapter, package):
    from test_emulator import list_again

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
    from test_emulator import list_again

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
