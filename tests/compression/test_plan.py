"""The plan: which layer becomes what."""

import pytest
from helpers import refusal, tiny_model

from scaleot_core.compression.plan import choose_layers, plan_for
from scaleot_core.params import changed


def chosen(scores, adapter_layers=1, alpha=0.25, placement="importance"):
    return choose_layers(scores, adapter_layers=adapter_layers, alpha=alpha, placement=placement)


@pytest.mark.parametrize("layers", [5, 12, 24, 30, 48, 54])
def test_count_of_harmonizers_is_rounded_half_up(layers):
    for percent in range(101):
        kinds = chosen([0.0] * layers, adapter_layers=4, alpha=percent / 100)
        assert kinds.count("adapter") == 4
        assert kinds.count("harmonizer") == (2 * percent * (layers - 4) + 100) // 200, percent


def test_highest_scores_are_adapters_and_lowest_are_replaced():
    scores = [0.1, -3.0, 2.0, 0.3, 5.0, -1.0, 0.2]
    assert chosen(scores, adapter_layers=2, alpha=0.4) == (
        "compressed",
        "harmonizer",
        "adapter",
        "compressed",
        "adapter",
        "harmonizer",
        "compressed",
    )


@pytest.mark.parametrize(("count", "adapters"), [(1, [0]), (2, [0, 7]), (3, [0, 1, 7]), (4, [0, 1, 6, 7])])
def test_ends_are_adapters_whatever_the_scores(count, adapters):
    scores = [-9.0, -8.0, 1.0, 2.0, 3.0, 4.0, -7.0, -6.0]
    kinds = chosen(scores, adapter_layers=count, alpha=1.0, placement="ends")
    assert [i for i, kind in enumerate(kinds) if kind == "adapter"] == adapters
    fewer = chosen(scores, adapter_layers=4, alpha=0.5, placement="ends")
    assert fewer[2:6] == ("harmonizer", "harmonizer", "compressed", "compressed")


def test_alpha_takes_nothing_at_zero_and_everything_at_one():
    assert set(chosen([3.0, 1.0, 2.0, 0.0], alpha=0.0)[1:]) == {"compressed"}
    assert set(chosen([3.0, 1.0, 2.0, 0.0], alpha=1.0)[1:]) == {"harmonizer"}


def test_no_layer_has_to_be_an_adapter_layer():
    for placement in ("importance", "ends"):
        kinds = chosen([3.0, 1.0, 2.0, 0.0], 0, alpha=0.25, placement=placement)
        assert kinds == ("compressed", "compressed", "compressed", "harmonizer")


def test_plan_that_leaves_no_decoder_layer_is_refused(params):
    nothing = changed(params, {"adapters": ["lora"], "adapter_layers": 0, "alpha": 1.0})
    assert "no decoder layer to tune" in refusal(plan_for, nothing, [0.0] * 4, tiny_model("llama"))


@pytest.mark.parametrize("count", [4, 5])
def test_some_layer_must_be_left_beside_the_adapters(count):
    assert f"adapter_layers = {count}" in refusal(chosen, [1.0, 2.0, 3.0, 4.0], count)
    assert chosen([1.0, 2.0, 3.0, 4.0], 3).count("adapter") == 3
