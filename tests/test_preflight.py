"""Before the first heavy stage: what doesn't fit is refused by its key, and what a run costs is foreseen."""

import io
import json
import re

import pytest
import torch
import yaml
from helpers import CONFIGS, ROOT, refusal, tiny_model
from rich.console import Console

from scaleot_core import preflight
from scaleot_core.common.runtime import Runtime
from scaleot_core.models.families import FAMILIES
from scaleot_core.params import changed
from scaleot_core.preflight import check_model, check_sources, forward_tokens


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def fitting(params, folder):
    """Parameters that ask for all that the tiny model has: 4 layers, 128 tokens of context."""
    return changed(params, {"model": str(folder), "adapter_layers": 3, "dlr.group_size": 4, "data.block_size": 128})


# --- sources ---------------------------------------------------------------------------------------------


def test_sources_that_are_there_or_are_names_pass(params, fitting, folder, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    check_sources(params)
    check_sources(changed(params, {"model": "org/name", "data.questions": "hub", "data.corpus": "org/text"}))
    check_sources(changed(fitting, {"data.questions": str(tmp_path), "data.corpus": str(tmp_path / "text.jsonl")}))


@pytest.mark.parametrize("key", ["model", "data.questions", "data.corpus"])
@pytest.mark.parametrize("path", ["./none", "../none", "/none/such", "~/none"])
def test_missing_path_is_named_by_its_key(params, tmp_path, monkeypatch, key, path):
    monkeypatch.chdir(tmp_path)
    said = refusal(check_sources, changed(params, {key: path}))
    assert said.startswith(f"{key} = {path!r}: no such file or folder")


@pytest.mark.parametrize(("key", "path"), [("data.questions", "lab"), ("data.corpus", "lab/text.jsonl")])
def test_missing_path_that_can_be_no_name_is_named_by_its_key(params, tmp_path, monkeypatch, key, path):
    monkeypatch.chdir(tmp_path)
    assert refusal(check_sources, changed(params, {key: path})).startswith(f"{key} = {path!r}: ")


def test_corpus_of_no_kind_that_is_read_is_named_before_the_model_is_fetched(params, tmp_path):
    (tmp_path / "corpus.md").write_text("some text")
    said = refusal(check_sources, changed(params, {"data.corpus": str(tmp_path / "corpus.md")}))
    assert said.startswith(f"data.corpus = '{tmp_path / 'corpus.md'}': of no kind that is read")


def test_home_folder_is_known(params, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.TXT").write_text("a")
    assert preflight.located(changed(params, {"data.corpus": "~/text.TXT"})).data.corpus == str(tmp_path / "text.TXT")


def test_folder_without_weights_is_named(fitting, folder):
    (folder / "model.safetensors").unlink()
    said = refusal(check_sources, fitting)
    assert said.startswith(f"model = {str(folder)!r}: no weights") and "safetensors" in said


@pytest.mark.parametrize("config", [None, "{", "{}"], ids=["none", "half", "empty"])
def test_folder_without_a_configuration_is_named(fitting, folder, config):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert str(folder) in refusal(check_sources, fitting)


# --- the model -------------------------------------------------------------------------------------------


def test_unsupported_architecture_names_the_supported_ones(fitting, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    for check in (lambda: check_sources(fitting), lambda: check_model(fitting, folder)):
        said = refusal(check)
        assert said.startswith("model: architecture 'bert' is not supported") and all(name in said for name in FAMILIES)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize(
    ("key", "least_wrong", "has", "limit"),
    [
        ("adapter_layers", 4, "4 decoder layers", "1 to 3"),
        ("dlr.group_size", 5, "4 decoder layers", "2 to 4"),
        ("data.block_size", 129, "128 tokens", "8 to 128"),
    ],
)
def test_parameter_larger_than_the_model_is_named(fitting, tmp_path, name, key, least_wrong, has, limit):
    CONFIGS[name].save_pretrained(tmp_path / name)
    check_model(fitting, tmp_path / name)  # one less is the model's own size, and fits
    said = refusal(check_model, changed(fitting, {key: least_wrong}), tmp_path / name)
    assert said.startswith(f"{key} = {least_wrong}: ") and has in said and limit in said


def test_local_model_is_checked_with_the_sources(fitting):
    assert "adapter_layers = 5" in refusal(check_sources, changed(fitting, {"adapter_layers": 5}))


# --- what a run costs ------------------------------------------------------------------------------------

FITS, DLR, SRC, ZERO, FULL, TUNE, EVALUATE = (
    "layer_importance",
    "train_harmonizers",
    "compress",
    "zero_shot",
    "full_finetune",
    "offsite_tune",
    "evaluate",
)


def test_every_forward_pass_is_a_stage_of_the_pipeline_and_costs_something(params):
    tokens = forward_tokens(params)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert tokens.keys() == stages.keys() - {"sources", "prepare_data"}
    assert min(tokens.values()) > 0


@pytest.mark.parametrize(
    ("key", "factor", "stages"),
    [
        ("data.block_size", 2, {FITS, DLR, SRC}),
        ("layer_importance.calibration_blocks", 2, {FITS}),
        ("layer_importance.sensitivity_blocks", 2, {FITS}),
        ("layer_importance.steps", 2, {FITS}),
        ("layer_importance.batch_tokens", 2, {FITS}),
        ("dlr.steps", 2, {DLR}),
        ("dlr.batch_blocks", 2, {DLR}),
        ("dlr.candidates", 2, {DLR}),
        ("dlr.score_interval", 0.5, {DLR}),
        ("rank_compression.calibration_blocks", 2, {SRC}),
        ("data.train_questions", 2, {FULL, TUNE}),
        ("data.eval_questions", 2, {ZERO, FULL, EVALUATE}),
        ("offsite_tune.epochs", 2, {TUNE}),
        ("full_finetune.epochs", 2, {FULL}),
        ("tasks", 2, {ZERO, FULL, TUNE, EVALUATE}),
        ("alpha", 2, set()),
    ],
)
def test_tokens_grow_with_what_a_stage_is_asked_for_and_in_no_other(params, key, factor, stages):
    *blocks, last = key.split(".")
    old = getattr(getattr(params, blocks[0]) if blocks else params, last)
    new = [*old, "sciq", "arc_easy"] if key == "tasks" else type(old)(old * factor)
    before, after = forward_tokens(params), forward_tokens(changed(params, {key: new}))
    assert {stage for stage in after if after[stage] > before[stage]} == stages
    assert all(after[stage] == before[stage] for stage in after.keys() - stages)


def test_every_kind_of_adapters_is_tuned_and_measured(params):
    both, one = (forward_tokens(changed(params, {"adapters": kinds})) for kinds in (["layers", "lora"], ["lora"]))
    assert both[TUNE] == 2 * one[TUNE] and both[EVALUATE] > one[EVALUATE]
    assert all(both[stage] == one[stage] for stage in both.keys() - {TUNE, EVALUATE})


def test_step_limit_bounds_the_tokens_of_tuning(params):
    unbounded, one, many = (
        forward_tokens(changed(params, {"offsite_tune.max_steps": n, "full_finetune.max_steps": n}))
        for n in (0, 1, 10**6)
    )
    assert many == unbounded
    for stage in (FULL, TUNE):
        assert 0 < one[stage] < unbounded[stage]


def test_preview_has_a_line_a_stage_with_minutes_and_their_sum(fitting, folder, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(preflight, "console", Console(file=printed, width=200))
    monkeypatch.setattr(preflight, "_rate", lambda runtime, dtype: 1e6)
    monkeypatch.setattr(preflight, "_decomposition_seconds", lambda config: 600)
    preflight.show(fitting, folder, Runtime(torch.device("cpu"), torch.float32))
    minutes = {}
    for row in printed.getvalue().splitlines():
        if found := re.search(r"(\w+) .* ([\d.]+) min", row):
            minutes[found[1]] = float(found[2])
    total = minutes.pop("all")
    assert minutes.keys() == forward_tokens(fitting).keys()
    assert total == pytest.approx(sum(minutes.values()), abs=1)
    parameters = tiny_model("llama").num_parameters()
    spent = forward_tokens(fitting)[DLR] * 2 * parameters / (1e6 * preflight.EFFICIENCY) + preflight.OVERHEAD_SECONDS
    assert minutes[DLR] == pytest.approx(spent / 60, abs=0.06)
    covariances = forward_tokens(fitting)[SRC] * 2 * parameters / (1e6 * preflight.EFFICIENCY)
    assert minutes[SRC] == pytest.approx((covariances + preflight.OVERHEAD_SECONDS + 600) / 60, abs=0.06)
    assert f"{parameters / 1e6:.0f} M parameters on cpu" in printed.getvalue()


def test_decompositions_are_foreseen_from_a_small_one(monkeypatch):
    clock = iter([0.0, 0.5])
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: next(clock))
    config = CONFIGS["gpt2"]  # 4 layers; q, k and v fused, and the output's: 4 matrices of 32
    assert preflight._decomposition_seconds(config) == pytest.approx(0.5 * (32 / preflight.SMALL) ** 3 * 4 * 4)


@pytest.mark.slow
def test_rate_is_measured_in_operations_a_second(monkeypatch):
    clock = iter([0.0, 10.0, 12.0])  # a warm-up that doesn't count, then 6 products of 1024 × 1024 matrices
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: next(clock))
    assert preflight._rate(Runtime(torch.device("cpu"), torch.float32), torch.float32) == 6 * 2 * 1024**3 / 2.0


@pytest.mark.parametrize(("rate", "is_said"), [(6e6, True), (1e6, False)])
def test_dtype_that_the_device_has_no_instructions_for_is_said(fitting, folder, monkeypatch, rate, is_said):
    printed = io.StringIO()
    monkeypatch.setattr(preflight, "console", Console(file=printed, width=200))
    monkeypatch.setattr(preflight, "_rate", lambda runtime, dtype: rate if dtype == torch.float32 else 1e6)
    preflight.show(changed(fitting, {"dtype": "bfloat16"}), folder, Runtime(torch.device("cpu"), torch.bfloat16))
    assert ("with dtype = float32 matrix products are 6.0 times as fast" in printed.getvalue()) == is_said
