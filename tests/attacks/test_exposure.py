"""Every tensor of the model is listed once, by how much of it the package has."""

import pytest
import torch
from helpers import CPU, WHOLE, each_shape, emulator_of, plan_of, tiny_model

from scaleot_core.attacks import exposure
from scaleot_core.common.files import write_json
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression.emulator import assemble
from scaleot_core.compression.plan import layers_of
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.families import family
from scaleot_core.params import changed
from scaleot_core.training.checkpoint import Checkpoint


@each_shape
def test_exposure_tells_every_tensor_of_the_model_once(name):
    model = tiny_model(name)
    rows = exposure.exposure(model, emulator_of(name), plan_of(model))
    total = sum(t.numel() * 4 for key, t in model.state_dict().items() if key not in model.all_tied_weights_keys)
    assert sum(row["bytes"] for row in rows) == total and len({row["tensor"] for row in rows}) == len(rows)
    path = family(model.config).layers
    of = {i: [row for row in rows if row["tensor"].startswith(f"{path}.{i}.")] for i in range(4)}
    assert {row["given"] for row in of[0]} == {"none"}  # the harmonizer's layer
    assert {row["given"] for row in of[1]} == {"exact"}  # the adapter layer
    cut = [row for row in of[2] if row["given"] == "rank"]
    assert cut and all(0 < row["error"] < 1 for row in cut)
    shares = exposure.shares(rows)
    assert sum(shares.values()) == pytest.approx(1) and all(shares.values())


def test_dense_product_of_low_rank_is_at_that_rank(tmp_path):
    plan = plan_of(tiny_model("llama"), beta=0.1)  # two factors would be larger
    rows = exposure.exposure(tiny_model("llama"), emulator_of("llama", plan), plan)
    cut = [row for row in rows if row["given"] == "rank"]
    assert len(cut) == 8 and {row["rank"] for row in cut} == {29, 14} and all(0 < row["error"] < 0.5 for row in cut)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ({"method": "gradot", "max_bytes_ratio": 0.8}, "exact"),
        ({"method": "channels", "channels.ratio": 0.25}, "rank"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_kept_channels_count_as_given(name, method, given, params, blocks, tmp_path):
    layers = 8
    real = tiny_model(name, num_hidden_layers=layers)
    real.save_pretrained(tmp_path, save_original_format=False)
    small = {
        "adapter_layers": 2,
        "alpha": 0.0,
        "rank_compression.calibration_blocks": 4,
    }
    write_json(tmp_path / "scores.json", {"scores": [float(i) for i in range(layers)]})
    values, none = changed(params, {**small, **method}), Checkpoint(tmp_path / "none", 1e9)
    owner = ModelOwner(tmp_path, Runtime(CPU, torch.float32), blocks, values, tmp_path, tmp_path / "scratch", none)
    made = METHODS[values.method](owner)
    plan, model = made.plan, assemble(owner.config, made.plan, made.tensors, device=CPU)
    rows = exposure.exposure(real, model, plan)
    out = family(real.config).feed_forward_out
    kept = [row for row in rows if row["tensor"].endswith(f"{out}.weight (kept channels)")]
    whole = real.get_submodule(f"{family(real.config).layers}.0.{out}").weight
    share = plan[layers_of(plan, "compressed")[0]].channels / max(whole.shape)
    assert 0 < share < 1 and len(kept) == layers - 2
    assert all(row["bytes"] == round(whole.numel() * 4 * share) and row["given"] == given for row in kept)
    assert given == "exact" or all(row["rank"] == min(whole.shape) for row in kept)
    into = [row for row in rows if row["tensor"].endswith("weight (kept channels)") and row not in kept]
    assert into and {row["given"] for row in into} == {"exact"}
    assert sum(exposure.shares(rows).values()) == pytest.approx(1)


def test_everything_is_given_where_nothing_is_cut():
    assert exposure.shares(exposure.exposure(tiny_model("llama"), emulator_of("llama", WHOLE), WHOLE))["exact"] == 1
