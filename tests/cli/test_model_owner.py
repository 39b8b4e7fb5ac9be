"""The model owner's commands, pack, check and plug, each from files alone."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    CPU,
    LORA,
    PLAN,
    ROOT,
    close,
    gives,
    list_again,
    logits,
    pruned_emulator,
    refused,
    scaleot,
    streamed,
    tiny_model,
    write_adapter,
    write_keys,
    write_package,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from scaleot_core.common.files import write_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.exchange.archive import unpacked
from scaleot_core.exchange.ledger import exact_weights, model_fingerprint
from scaleot_core.exchange.manifest import manifest_sha256
from scaleot_core.exchange.package import Package, save
from scaleot_core.models.forward import mean_loss
from scaleot_core.params import load_params
from scaleot_core.pipeline import read_entry
from scaleot_core.tuning.adapters import TunedLayers, plug_in


def tuned_on(folder, package, lora):
    """Write an adapter whose parameters have moved at random."""
    opened = Package(package)
    return write_adapter(folder, opened.load(CPU), lora, opened)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """Return the folder of the real model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory, tokenizer):
    return write_package(tmp_path_factory.mktemp("package") / "package", tiny_model("llama"), tokenizer)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, package):
    """Return an adapter of whole layers."""
    return tuned_on(tmp_path_factory.mktemp("adapter") / "adapter", package, None)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, package):
    return tuned_on(tmp_path_factory.mktemp("lora") / "lora", package, LORA)


@pytest.fixture
def forged(tmp_path, adapter):
    """Return a function that writes the adapter with tensors changed in place, those with a part in their names."""

    def forge(change, part):
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "forged"
        shutil.copytree(adapter, folder)
        tensors = read_tensors(folder / "adapter.safetensors")
        for name in tensors:
            if part in name:
                change(tensors[name])
        write_tensors(folder / "adapter.safetensors", tensors)
        list_again(folder, "adapter.safetensors")
        return folder

    return forge


def blocks_loss(model, public):
    """Compute the loss of a model on the first blocks of public text by itself."""
    passages = public.read_text().split("\n\n")
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    tokens = [token for text in passages for token in tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]]
    return mean_loss(model, torch.tensor(tokens[: 8 * 128]).view(8, 128))


# --- pack ------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, package, base):
    """Return what the pipeline leaves of a plan, where α = 0.33 and β = 0.8."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values |= {"alpha": 0.33, "beta": 0.8, "adapter_layers": 1}
    values["harmonizer"]["rank"] = 8
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(package, tmp_path / "artifacts" / "emulator")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    params = read_entry("compress", file=tmp_path / "dvc.yaml").values(load_params(tmp_path / "params.yaml"))
    shipped = Package(package)
    exact = exact_weights(shipped, streamed(base), {}).model_dump()
    private = {"scores": [0.0, 3.0, 2.0, 1.0], "params": params, "channels": {"2": [0, 1]}}
    private |= {"package": shipped.sha256, "exact": exact}
    write_json(tmp_path / "artifacts" / "emulator.private.json", private)
    return tmp_path


def test_pack_counts_what_all_packages_have_together_and_refuses_beyond_a_limit(tmp_path, project, base):
    """The other package has, beside half of the first layer's rows, all that this one lacks."""
    alone = gives("pack", "--project", project, "--out", project / "one")["exact"]
    ledger = project / "ledger.private.json"
    assert ledger.stat().st_mode & 0o777 == 0o600
    ledger.unlink()
    emulator = Package(project / "artifacts" / "emulator")
    exact = exact_weights(emulator, streamed(base), {})
    missing = {n: t for n, t in streamed(base).tensors(streamed(base).names) if n not in exact.tensors}
    lines = {n: {"mask": hex(2 ** (len(t) // 2) - 1), "size": t[0].numel()} for n, t in missing.items()}
    other = {"model": model_fingerprint(base), "weights": exact.weights, "tensors": lines}
    write_json(tmp_path / "old.private.json", {"package": "other", "exact": other})
    command = ("pack", "--project", project, "--out", project / "two", "--beside", tmp_path / "old.private.json")
    assert f"{(1 + alone) / 2:.1%} of the model's weights" in refused(*command)
    assert not (project / "two").exists()
    assert gives(*command, "--max-union", 1)["exact, all packages"] == pytest.approx((1 + alone) / 2)
    write_json(tmp_path / "old.private.json", {"package": "other", "exact": other | {"model": "another"}})
    assert "of another model" in refused(*command[:4], project / "three", *command[5:])
    write_json(tmp_path / "old.private.json", {"package": "other"})
    assert "doesn't say what a package has" in refused(*command[:4], project / "three", *command[5:])


def test_leak_is_traced_to_its_recipient_and_a_marked_package_plugs(tmp_path, project, base, package):
    for name in ("ann", "ben"):
        gives("pack", "--project", project, "--out", project / name, "--recipient", name)
    private = [part for name in ("ann", "ben") for part in ("--private", project / f"{name}.private.json")]
    for leak, names in ((project / "ben", ["ben"]), (package, [])):
        traced = gives("trace", leak, *private, "--project", project)
        assert traced["recipients"] == names and max(traced["scores"], key=traced["scores"].get) in (
            *names,
            "ann",
            "ben",
        )
    assert "it can't be told" in scaleot("trace", package, *private, "--project", project).out
    adapter = tuned_on(tmp_path / "adapter", project / "ann", LORA)
    gives("plug", base, adapter, "--package", project / "ann", "--out", tmp_path / "plugged")
    gives("pack", "--project", project, "--out", project / "bare")
    bare = ("--private", project / "bare.private.json")
    assert "has no mark" in refused("trace", package, *bare, "--project", project)
    assert "no safetensors" in refused("trace", project, *private, "--project", project)


@pytest.mark.parametrize("name", ["shipped", "shipped.zip"])
def test_pack_ships_the_package_and_keeps_the_scores(project, name):
    out = project / name
    answer = gives("pack", "--project", project, "--out", out, "--license", "for tests alone")
    shown = gives("inspect", out)
    assert shown["license"] == "for tests alone" and shown["id"] == answer["id"] and shown["sound"] is True
    private = json.loads((project / f"{name}.private.json").read_text())
    assert private["package"] == answer["id"] and private["scores"] == [0.0, 3.0, 2.0, 1.0]
    assert private["params"]["alpha"] == 0.33 and private["channels"] == {"2": [0, 1]}
    text = "".join(f.read_text() for f in out.glob("*.json")) if out.is_dir() else out.read_bytes().decode("latin1")
    assert not [word for word in ("scores", "channels", "alpha", "train_blocks", str(project)) if word in text]


def test_pack_of_int8_is_smaller_and_goes_all_the_way(tmp_path, project, base):
    """Pack, tune, check and plug in, from archive to archive."""
    shipped, returned = project / "small.zip", tmp_path / "lora.zip"
    (tmp_path / "records.jsonl").write_text('{"prompt": "count to 3", "completion": " one to 3"}\n' * 20)
    gives("pack", "--project", project, "--out", project / "full.zip")
    answer = gives("pack", "--project", project, "--out", shipped, "--quantize", "int8")
    shown = gives("inspect", shipped)
    assert (shown["quantized"], shown["id"]) == ("int8", answer["id"])
    assert shown["bytes"] < gives("inspect", project / "full.zip")["bytes"]
    assert json.loads((project / "small.zip.private.json").read_text())["package"] == answer["id"]
    options = ("--quantize", "int8", "--lora-rank", 3, "--epochs", 2, "--threads", 1, "--device", "cpu")
    gives("tune", shipped, "--data", tmp_path / "records.jsonl", "--out", returned, *options)
    assert gives("check", returned, "--package", shipped)["sound"] is True
    gives("plug", base, returned, "--package", shipped, "--out", tmp_path / "plugged")
    assert not torch.equal(logits(load(tmp_path / "plugged")), logits(load(base)))


def test_pack_keeps_what_was_measured_of_the_package_and_of_no_other(project, package):
    shipped = manifest_sha256(package)
    write_json(project / "metrics.json", {"emulator": {"package": shipped}, "tasks": {}})
    write_json(project / "attack.json", {"package": "another", "weights": {}})
    gives("pack", "--project", project, "--out", project / "shipped")
    measured = json.loads((project / "shipped.private.json").read_text())["measured"]
    assert measured == {"metrics.json": {"emulator": {"package": shipped}, "tasks": {}}}
    assert not [f for f in (project / "shipped").glob("*.json") if "measured" in f.read_text()]


def test_pack_refuses_what_params_no_longer_describes_and_a_license_too_long_to_read_back(project):
    command = ("pack", "--project", project, "--out", project / "out")
    assert "1000 are the most" in refused(*command, "--license", "x" * 1001)
    values = yaml.safe_load((project / "params.yaml").read_text())
    for change in ({"alpha": 0.9}, {"beta": 0.5}):
        (project / "params.yaml").write_text(yaml.safe_dump(values | change))
        assert "dvc repro" in refused(*command)
    assert not (project / "out").exists() and not (project / "out.private.json").exists()


def test_archive_has_the_same_bytes_each_time_and_is_read_like_the_folder(project):
    for name in ("one.zip", "two.zip", "folder"):
        gives("pack", "--project", project, "--out", project / name)
    assert (project / "one.zip").read_bytes() == (project / "two.zip").read_bytes()
    one, folder = gives("inspect", project / "one.zip"), gives("inspect", project / "folder")
    assert {**one, "path": 0} == {**folder, "path": 0}


def test_owner_may_tell_the_recovery_that_it_measured(project):
    recovery = {"lora": {"acc": 0.85, "answer_nll": 0.94}, "layers": {"acc": None, "answer_nll": 0.77}}
    kinds = {kind: {"recovery": figures, "plug_in": {"acc": 0.5}} for kind, figures in recovery.items()}
    package = {"package": manifest_sha256(project / "artifacts" / "emulator")}
    metrics = {"emulator": package, "tasks": {"piqa": {"adapters": kinds}}}
    file = project / "metrics.json"
    write_json(file, metrics)
    gives("pack", "--project", project, "--out", project / "told", "--figures", file)
    shown = gives("inspect", project / "told")["recovery, as its owner measured it"]
    assert shown["piqa, lora"] == {"acc": 0.85, "answer_nll": 0.94} and shown["piqa, layers"]["acc"] is None
    assert "0.94" in scaleot("inspect", project / "told").out
    gives("pack", "--project", project, "--out", project / "silent")
    assert "recovery, as its owner measured it" not in gives("inspect", project / "silent")
    command = ("pack", "--project", project, "--out", project / "other", "--figures", file)
    write_json(file, {**metrics, "emulator": {"package": "0" * 64}})
    assert "another package" in refused(*command)
    write_json(file, {"tasks": {}})
    assert "no metrics.json" in refused(*command)
    assert not (project / "other").exists()


# --- check -----------------------------------------------------------------------------------------------


def test_check_says_how_far_each_layer_moved(adapter, package):
    (moved,) = gives("check", adapter, "--package", package)["layer_changes"]
    before, after = read_tensors(package / "adapter.safetensors"), read_tensors(adapter / "adapter.safetensors")
    change = torch.cat([(after[name] - tensor).flatten() for name, tensor in before.items()])
    weights = torch.cat([tensor.flatten() for tensor in before.values()])
    assert moved["layer"] == 1 and moved["relative"] == pytest.approx(float(change.norm() / weights.norm()), rel=1e-5)
    peaks = [(after[name] - t).abs().max() / (after[name] - t).square().mean().sqrt() for name, t in before.items()]
    assert moved["outlier"] == pytest.approx(float(max(peaks)), rel=1e-5)
    assert "relative change" in scaleot("check", adapter, "--package", package).out


def test_one_poisoned_weight_is_an_outlier(adapter, forged, package):
    poisoned = forged(lambda weight: weight[3, 5].add_(10.0), "up_proj")
    (clean,), (spoilt,) = (
        gives("check", folder, "--package", package)["layer_changes"] for folder in (adapter, poisoned)
    )
    assert spoilt["outlier"] > 5 * clean["outlier"]


# --- plug ------------------------------------------------------------------------------------------------


def test_plug_in_is_a_plain_transformers_folder(tmp_path, base, adapter, package):
    gives("plug", base, adapter, "--package", package, "--out", tmp_path / "plugged")
    names = {f.name for f in (tmp_path / "plugged").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    expected = tiny_model("llama")
    plug_in(expected, PLAN, TunedLayers(read_tensors(adapter / "adapter.safetensors")))
    plugged = logits(load(tmp_path / "plugged"))
    assert torch.equal(plugged, logits(expected)) and not torch.equal(plugged, logits(tiny_model("llama")))
    AutoTokenizer.from_pretrained(tmp_path / "plugged", local_files_only=True)


def test_package_has_a_card_and_is_signed(project, tmp_path):
    private, public = write_keys(tmp_path, "owner")
    gives("pack", "--project", project, "--out", project / "signed.zip", "--license", "MIT", "--sign", private)
    assert gives("inspect", project / "signed.zip", "--verify", public)["signature"] == f"by the owner of {public}"
    with unpacked(project / "signed.zip") as folder:
        assert "license: mit" in (folder / "README.md").read_text()
    message = refused("pack", "--project", project, "--out", project / "other", "--sign", public)
    assert "no private key to sign with" in message and not (project / "other").exists()


def test_plugged_in_lora_is_what_peft_loads(tmp_path, base, package, lora):
    gives("plug", base, lora, "--package", package, "--out", tmp_path / "plugged", "--as-lora", tmp_path / "lora")
    plugged = logits(load(tmp_path / "plugged"))
    for folder in (lora, tmp_path / "lora"):
        close(logits(PeftModel.from_pretrained(load(base), folder)), plugged)
    assert not torch.equal(plugged, logits(tiny_model("llama")))
    assert sorted(os.listdir(tmp_path / "lora")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_lora_over_some_of_the_channels_needs_what_its_owner_kept(tmp_path, base, tokenizer):
    package, private = tmp_path / "package", tmp_path / "package.private.json"
    package.mkdir()
    emulator, plan, kept, real = pruned_emulator("llama", beta=0.8, adapter_layer=False)
    save(package, real.config, tokenizer, plan, package_tensors(emulator, plan))
    channels = {str(i): indices.tolist() for i, indices in kept.items()}
    write_json(private, {"package": manifest_sha256(package), "channels": channels})
    lora = tuned_on(tmp_path / "tuned", package, LORA)
    command = ("plug", base, lora, "--package", package)
    gives(*command, "--out", tmp_path / "plugged", "--as-lora", tmp_path / "lora")
    close(logits(PeftModel.from_pretrained(load(base), tmp_path / "lora")), logits(load(tmp_path / "plugged")))
    private.rename(tmp_path / "elsewhere.json")
    assert "--private" in refused(*command, "--out", tmp_path / "out")
    gives(*command, "--out", tmp_path / "out", "--private", tmp_path / "elsewhere.json")
    write_json(tmp_path / "other.json", {"package": "0" * 64, "channels": channels})
    message = refused(*command, "--out", tmp_path / "out2", "--private", tmp_path / "other.json")
    assert "another package" in message


def test_folders_of_which_one_would_replace_the_other_are_refused(tmp_path, base, package, lora):
    command = ("plug", base, lora, "--package", package)
    for out, as_lora in (("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "c/../a/b")):
        message = refused(*command, "--out", tmp_path / out, "--as-lora", tmp_path / as_lora)
        assert "--out and --as-lora: one is the other, or lies in it" in message


def test_plug_needs_something_to_write(tmp_path, base, adapter, package):
    assert "nothing to write" in refused("plug", base, adapter, "--package", package)
    message = refused("plug", base, adapter, "--package", package, "--as-lora", tmp_path / "lora")
    assert "no LoRA" in message and os.listdir(tmp_path) == []


def test_limits_refuse_an_adapter_that_moved_too_far(tmp_path, base, adapter, package):
    (moved,) = gives("check", adapter, "--package", package)["layer_changes"]
    command = ("plug", base, adapter, "--package", package, "--out", tmp_path / "out")
    assert "layer 1 has change" in refused(*command, "--max-change", moved["relative"] * 0.99)
    assert "layer 1 has outlier" in refused(*command, "--max-outlier", moved["outlier"] * 0.99)
    assert os.listdir(tmp_path) == []
    gives(*command, "--max-change", moved["relative"] * 1.01, "--max-outlier", moved["outlier"] * 1.01)


def test_forged_adapter_is_refused_by_default_limits_and_by_the_trial(tmp_path, base, forged, package):
    """Norms that are zeroed or turned round hardly change a layer; numbers that overflow are lifted past all limits."""
    out = ("--package", package, "--out", tmp_path / "out")
    for change, value in ((torch.zero_, "1,"), (torch.neg_, "2.0")):
        adapter = forged(change, "norm")
        assert f"layer 1 has tensor change {value}" in refused("plug", base, adapter, *out)
        assert gives("check", adapter, "--package", package)["layer_changes"][0]["relative"] < 0.6
    lifted = ("--max-change", 2, "--max-tensor-change", 2.1)
    assert gives("plug", base, adapter, "--package", package, "--out", tmp_path / "lifted", *lifted)
    beyond = ("--max-change", 1e45, "--max-tensor-change", 1e45, "--max-outlier", 1e45)
    overflowing = forged(lambda weight: weight.fill_(3e38), "norm")
    assert "the plug-in's loss is nan" in refused("plug", base, overflowing, *out, *beyond)
    assert "layer 1 has change" in refused("plug", base, overflowing, *out)
    assert not (tmp_path / "out").exists()


def test_plug_in_that_is_worse_on_public_text_is_refused(tmp_path, base, forged, package):
    public = tmp_path / "public.txt"
    public.write_text("one two three\n\n" * 200)
    adapter = forged(lambda weight: weight.mul_(1.4), "down_proj")
    command = ("plug", base, adapter, "--package", package, "--public", public)
    summary = gives(*command, "--out", tmp_path / "plugged", "--max-loss-increase", 100)
    before, after = (summary[f"loss on public text, {model}"] for model in ("real model", "plug-in"))
    assert after > before == pytest.approx(blocks_loss(load(base), public), rel=1e-4)
    assert after == pytest.approx(blocks_loss(load(tmp_path / "plugged"), public), rel=1e-4)
    message = refused(*command, "--out", tmp_path / "out", "--max-loss-increase", (after - before) / 2)
    assert f"is {after:.3f} nats instead of {before:.3f}" in message and not (tmp_path / "out").exists()
    public.write_text("short")
    assert "are needed; name a longer one" in refused(*command, "--out", tmp_path / "out")


def test_base_that_the_package_was_not_made_from(tmp_path, adapter, package, tokenizer):
    other = tiny_model("llama")
    other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    message = refused("plug", tmp_path / "other", adapter, "--package", package, "--out", tmp_path / "out")
    assert "made from another model" in message and os.listdir(tmp_path) == ["other"]
    (tmp_path / "empty").mkdir()
    message = refused("plug", tmp_path / "empty", adapter, "--package", package, "--out", tmp_path / "out")
    assert message.startswith(f"error: BASE = '{tmp_path / 'empty'}': ") and not os.listdir(tmp_path / "empty")


# --- paths, of every command -----------------------------------------------------------------------------


def test_output_that_exists_is_not_written_over(tmp_path, package, adapter, base, project):
    (tmp_path / "out").mkdir()
    for command in (
        ("pack", "--project", project),
        ("tune", package, "--data", "x"),
        ("plug", base, adapter, "--package", package),
        ("plug", base, adapter, "--package", package, "--as-lora", tmp_path / "new"),
    ):
        assert "it is there already" in refused(*command, "--out", tmp_path / "out")


def test_missing_path_is_named_and_nothing_is_written(tmp_path, package, adapter, base):
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
