import pytest
from helpers import refusal, tiny_model

from scaleot_core.compression.layer_choice import choose_layers, end_layers, plan_for, ranks_left
from scaleot_core.compression.plan import layers_of
from scaleot_core.compression.shapes import layer_shapes
from scaleot_core.params import changed


def test_highest_scores_are_adapters_and_lowest_are_replaced():
    scores = [0.1, -3.0, 2.0, 0.3, 5.0, -1.0, 0.2]
    assert choose_layers(scores, adapter_layers=2, replaced=2, placement="importance") == ({2, 4}, {1, 5})
    assert choose_layers(scores, adapter_layers=2, replaced=0, placement="importance") == ({2, 4}, set())
    assert choose_layers(scores, adapter_layers=0, replaced=7, placement="importance") == (set(), {*range(7)})


@pytest.mark.parametrize(("count", "adapters"), [(0, set()), (1, {0}), (2, {0, 7}), (3, {0, 1, 7}), (4, {0, 1, 6, 7})])
def test_end_layers_are_adapters_whatever_the_scores(count, adapters):
    scores = [-9.0, -8.0, 1.0, 2.0, 3.0, 4.0, -7.0, -6.0]
    assert end_layers(8, count) == adapters
    assert choose_layers(scores, adapter_layers=count, replaced=1, placement="ends")[0] == adapters
    assert choose_layers(scores, adapter_layers=4, replaced=2, placement="ends")[1] == {2, 3}


@pytest.mark.parametrize("layers", [5, 12, 24])
def test_count_of_harmonizers_is_rounded_half_up(layers, params):
    shapes = layer_shapes(tiny_model("llama", num_hidden_layers=layers))
    for percent in range(0, 101, 5):
        plan = plan_for(changed(params, {"alpha": percent / 100}), [0.0] * layers, shapes)
        assert len(layers_of(plan, "adapter")) == 4
        assert len(layers_of(plan, "harmonizer")) == (2 * percent * (layers - 4) + 100) // 200, percent


def test_plan_states_what_alpha_beta_and_channels_give(params):
    model, given = tiny_model("gpt2"), {"adapter_layers": 1, "alpha": 0.34, "beta": 0.5, "channels.ratio": 0.25}
    plan = plan_for(changed(params, {**given, "harmonizer.rank": 5}), [4.0, 1.0, 2.0, 3.0], layer_shapes(model))
    assert [layer.kind for layer in plan] == ["adapter", "harmonizer", "compressed", "compressed"]
    assert plan[1].harmonizer_rank == 5 and plan[2].channels == 96
    assert plan[2].ranks == {"c_attn": (16, 16, 16), "c_proj": (16,)}
    assert ranks_left(layer_shapes(model), 0.0) == {}


@pytest.mark.parametrize("count", [4, 5])
def test_some_layer_must_be_left_beside_the_adapters(count, params):
    shapes = layer_shapes(tiny_model("llama"))
    assert f"adapter_layers = {count}" in refusal(
        plan_for, changed(params, {"adapter_layers": count}), [0.0] * 4, shapes
    )


def test_plan_that_leaves_no_decoder_layer_is_refused(params):
    nothing = changed(params, {"adapters": ["lora"], "adapter_layers": 0, "alpha": 1.0})
    assert "no decoder layer to tune" in refusal(plan_for, nothing, [0.0] * 4, layer_shapes(tiny_model("llama")))
