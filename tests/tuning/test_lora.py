"""LoRA in an emulator: where it lies, that it starts at nothing, and that the real model takes it there too."""

import json

import pytest
import torch
from helpers import (
    EIGHT,
    LORA,
    PLAN,
    SHAPES,
    close,
    each_shape,
    emulator_of,
    logits,
    move_lora,
    plan_of_kinds,
    pruned_emulator,
    refusal,
    tiny_model,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from scaleot_core.compression.channels import channels_of
from scaleot_core.compression.low_rank import FusedProjection, LowRankLinear, features, weight_of
from scaleot_core.exchange.adapter_folder import save_peft
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.tuning.adapters import fit_to_model, plugged_in, tuned_emulator
from scaleot_core.tuning.lora import insert_lora, lora_features, lora_layers, remove_lora, target_modules

ATTENTION = LORA.model_copy(update={"modules": "attention"})
ADAPTER_LAYERS = LORA.model_copy(update={"layers": "adapter"})
SHARED = plan_of_kinds(("harmonizer", "adapter", "shared", "compressed"), {2: 1})


def others(model, kept):
    """Which of a layer's feed-forward channels are not kept."""
    gone = torch.ones(channels_of(model, 0), dtype=torch.bool)
    gone[kept] = False
    return gone


@torch.no_grad()
def silence(model, kept):
    """Set all of a model's feed-forward channels to zero but those that were kept."""
    for i, those in kept.items():
        for inner, fused in family(model.config).feed_forward_in.items():
            module = decoder_layers(model)[i].get_submodule(inner)
            weight, bias = weight_of(module)
            gone = others(model, those).repeat(fused)
            weight[gone] = 0
            if bias is not None:
                bias[gone] = 0


# --- where it lies ---------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("lora", [LORA, ATTENTION, ADAPTER_LAYERS], ids=["all", "attention", "adapter layers"])
def test_every_matrix_of_the_layers_asked_for_has_lora_and_nothing_changes(name, lora):
    model = emulator_of(name)
    parameters = insert_lora(model, PLAN, lora, seed=0)
    assert torch.equal(logits(model), logits(emulator_of(name)))
    path, layers = family(model.config).layers, (1,) if lora is ADAPTER_LAYERS else (1, 2, 3)
    matrices = {f"{path}.{i}.{inner}" for i in layers for inner in target_modules(model.config, lora)}
    assert {key.partition(".lora_")[0] for key in parameters} == matrices and len(parameters) == 2 * len(matrices)
    assert all(f".{family(model.config).attention}." in key for key in parameters) == (lora is ATTENTION)
    real = tiny_model(name)
    for key, (into, out) in lora_features(emulator_of(name), PLAN, lora).items():
        assert (into, out) == features(real.get_submodule(key))
        assert parameters[f"{key}.lora_A.default.weight"].shape == (3, into)
        assert parameters[f"{key}.lora_B.default.weight"].shape == (out, 3)


def test_lora_lies_on_factors_fused_projections_and_shared_layers():
    emulators = map(emulator_of, EIGHT)
    kinds = {type(emulator.get_submodule(key)) for emulator in emulators for key in lora_features(emulator, PLAN, LORA)}
    assert {LowRankLinear, FusedProjection, Conv1D, torch.nn.Linear} <= kinds
    model = emulator_of("llama", SHARED)
    factors = move_lora(model, SHARED).factors
    assert lora_layers(SHARED, LORA) == [1, 2, 3]
    pair = [factors[f"model.layers.{i}.mlp.up_proj"][1] for i in (1, 2)]
    assert not torch.equal(*pair)  # each has its own, though the layer beneath is shared


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_computes_in_the_emulators_dtype_and_is_taken_out_again(name, dtype):
    model, plain = emulator_of(name).to(dtype), emulator_of(name).to(dtype)
    names = list(dict(model.named_modules()))
    first = insert_lora(model, PLAN, LORA, seed=0)
    assert {p.dtype for p in first.values()} == {dtype} and not any(p.requires_grad for p in model.parameters())
    other = insert_lora(emulator_of(name).to(dtype), PLAN, LORA, seed=1)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    remove_lora(model)
    assert list(dict(model.named_modules())) == names and torch.equal(logits(model), logits(plain))
    again = insert_lora(model, PLAN, LORA, seed=0)
    assert all(torch.equal(first[key], again[key]) for key in again)


# --- what the real model makes of it ---------------------------------------------------------------------


@each_shape
def test_every_map_of_the_real_model_changes_as_the_emulators_did(name):
    """Fused ones in the order of their outputs; stored as (in, out) or (out, in)."""
    model, real = emulator_of(name), tiny_model(name)
    untuned = emulator_of(name)
    adapter = move_lora(model)
    fitted = fit_to_model(adapter, real, {})
    before = {key: real.get_submodule(key) for key in adapter.factors}
    x = {key: torch.randn(2, features(module)[0]) for key, module in before.items()}
    was = {key: module(x[key]) for key, module in before.items()}
    with torch.no_grad(), plugged_in(real, PLAN, fitted):
        for key in adapter.factors:
            change = model.get_submodule(key)(x[key]) - untuned.get_submodule(key)(x[key])
            assert change.abs().max() > 1e-3
            close(real.get_submodule(key)(x[key]) - was[key], change)
    assert torch.equal(logits(real), logits(tiny_model(name)))


@each_shape
def test_real_model_without_the_channels_that_were_cut_gives_the_tuned_emulators_logits(name):
    emulator, plan, kept, real = pruned_emulator(name)
    silence(real, kept)
    close(logits(emulator), logits(real))
    untuned = logits(emulator)
    adapter = move_lora(emulator, plan)
    fitted = fit_to_model(adapter, real, kept)
    with plugged_in(real, plan, fitted):
        close(logits(real), logits(emulator))
        assert (logits(real) - untuned).abs().max() > 1e-3
    remove_lora(emulator)
    with tuned_emulator(emulator, plan, adapter):
        tuned = logits(emulator)
    assert torch.equal(logits(emulator), untuned) and not torch.equal(tuned, untuned)


@each_shape
def test_channels_that_were_cut_get_nothing(name):
    emulator, plan, kept, real = pruned_emulator(name, beta=0.8)
    fitted = fit_to_model(move_lora(emulator, plan), real, kept)
    names = family(real.config)
    for i, those in kept.items():
        gone = others(real, those)
        for inner, fused in {**names.feed_forward_in, names.feed_forward_out: 1}.items():
            change = fitted.change(f"{names.layers}.{i}.{inner}")
            by_channel = change.T if inner == names.feed_forward_out else change
            for matrix in by_channel.chunk(fused):
                assert not matrix[gone].any() and (matrix[those].abs().sum(1) > 0).all()


@each_shape
def test_peft_gives_the_plug_ins_logits(name, tmp_path):
    emulator, plan, kept, real = pruned_emulator(name, beta=0.8)
    fitted = fit_to_model(move_lora(emulator, plan), real, kept)
    (tmp_path / "lora").mkdir()
    save_peft(tmp_path / "lora", real.config, fitted, layers=lora_layers(plan, LORA))
    real.save_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    untuned = logits(real)
    with plugged_in(real, plan, fitted):
        close(logits(loaded), logits(real))
        assert (logits(real) - untuned).abs().max() > 1e-3
        close(logits(loaded.merge_and_unload()), logits(real))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["lora_alpha"] == 5.0


# --- what is refused -------------------------------------------------------------------------------------


@each_shape
def test_rank_above_a_matrixs_own_is_refused(name):
    lora = LORA.model_copy(update={"rank": 33})
    assert "the rank is at most" in refusal(insert_lora, emulator_of(name), PLAN, lora, 0)
    emulator, plan, *_ = pruned_emulator(name)
    small = LORA.model_copy(update={"rank": 30})
    if min(out for shapes in SHAPES[name].values() for out in [sum(rows for rows, _ in shapes)]) >= 30:
        insert_lora(emulator, plan, small, 0)


def test_emulator_without_a_layer_to_adapt_is_refused():
    plan = plan_of_kinds(("harmonizer",) * 4)
    assert "no decoder layer" in refusal(insert_lora, emulator_of("llama", plan), plan, LORA, 0)
    plan = plan_of_kinds(("harmonizer", "compressed", "compressed", "compressed"))
    assert "no adapter layer" in refusal(insert_lora, emulator_of("llama", plan), plan, ADAPTER_LAYERS, 0)


@pytest.mark.parametrize(
    "channels",
    [
        {},
        {0: torch.arange(39)},
        {0: torch.arange(41)},
        {0: torch.arange(40) + 30},
        {0: torch.zeros(40, dtype=torch.long)},
    ],
    ids=["none", "too few", "too many", "beyond", "one many times"],
)
def test_channels_that_do_not_fit_are_refused(channels):
    emulator, plan, kept, real = pruned_emulator("llama")
    assert "channels" in refusal(
        fit_to_model, move_lora(emulator, plan), real, {**({} if not channels else kept), **channels}
    )
