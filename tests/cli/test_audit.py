"""The audit command: one verdict, exit code 1 where an adapter must not be sent; and tuning that says what it tells."""

import json

import pytest
import torch
from helpers import gives, plan_of_kinds, refused, scaleot, tiny_model

from scaleot_core.attacks.hostile_owner import set_trap
from scaleot_core.common.files import read_json
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.exchange.package import save

FEW = ("--epochs", 2, "--threads", 1, "--device", "cpu", "--lora-rank", 4, "--validation", 0.4)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [{"prompt": f"count to {i}", "completion": f" one to {i}"} for i in range(30)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module", params=["honest", "trap"])
def adapter(request, tmp_path_factory, tokenizer, records):
    """Return a package, the adapter tuned on it, what `inspect` and `tune` gave, and whether it is a trap."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model("opt", activation_function="gelu", hidden_size=128, word_embed_proj_dim=128, ffn_dim=256)
    plan = plan_of_kinds(("compressed",) * 4)
    if request.param == "trap":
        public = torch.randint(1, 257, (200, 12), generator=torch.Generator().manual_seed(0)).tolist()
        set_trap(model, 0, list(range(60, 110)), public)
    (folder / "package").mkdir()
    save(folder / "package", model.config, tokenizer, plan, package_tensors(model, plan))
    out = folder / "adapter.zip"
    tuned = gives("tune", folder / "package", "--data", records, "--out", out, *FEW)
    return folder / "package", out, gives("inspect", folder / "package"), tuned, request.param == "trap"


def test_inspect_tune_and_audit_alarm_for_the_trap_alone(adapter, records):
    package, out, inspected, tuned, is_trap = adapter
    assert bool(inspected["suspicious"]) == is_trap
    assert (tuned["largest share that never moved"] > 0.02) == is_trap
    assert read_json(out.with_name("adapter.zip.private.json"))["not_tuned_on"] == 12
    ended = scaleot("audit", out, "--package", package, "--data", records, "--json", "--threads", 1)
    summary = json.loads(ended.out)
    assert (ended.code, summary["may be sent"]) == ((1, False) if is_trap else (0, True))
    assert summary["largest share that never moved"] == tuned["largest share that never moved"]
    assert 0 <= summary["membership AUC"] <= 1
    assert ("don't send it" in ended.said[-1]) == is_trap


def test_limit_that_is_overstepped_is_the_reason(adapter, records):
    package, out, *_, is_trap = adapter
    if is_trap:
        assert gives("audit", out, "--package", package, "--data", records, "--max-unmoved", 1)["may be sent"]


def test_audit_without_the_private_file_asks_for_the_seed(adapter, records, tmp_path):
    package, out, *_ = adapter
    (tmp_path / "adapter.zip").write_bytes(out.read_bytes())
    arguments = ("audit", tmp_path / "adapter.zip", "--package", package, "--data", records)
    assert "name --seed" in refused(*arguments)
    ended = scaleot(*arguments, "--seed", 0, "--json")
    assert "membership AUC" not in json.loads(ended.out) and any("--held-out" in line for line in ended.said)
    held_out = ("--held-out", records, "--seed", 0, "--max-unmoved", 1)
    assert gives(*arguments, *held_out)["membership AUC"] == pytest.approx(0.5)


@pytest.mark.slow
def test_epsilon_alone_tunes_little_in_large_steps(adapter, records, tmp_path):
    package, *_ = adapter
    tuned = gives("tune", package, "--data", records, "--out", tmp_path / "a", "--epsilon", 8, "--delta", 0.01)
    manifest = read_json(tmp_path / "a" / "manifest.json")
    assert (manifest["lora"]["rank"], manifest["lora"]["modules"]) == (1, "attention")
    assert manifest["tuning"]["batch_size"] == 4 and manifest["tuning"]["lr"] == 0.01
    assert tuned["steps"] == 24 and tuned["largest share that never moved"] == 0
    summary = gives("audit", tmp_path / "a", "--package", package, "--data", records)
    assert "membership AUC" not in summary and summary["may be sent"]
