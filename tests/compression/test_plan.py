import pytest
from pydantic import ValidationError

from scaleot_core.compression.plan import Layer, check_plan, layers_of, shared_layers

ADAPTER, CUT = Layer(kind="adapter"), Layer(kind="compressed", ranks={"q_proj": (3,)}, channels=4)
SHARED, HARMONIZER = Layer(kind="shared", source=0), Layer(kind="harmonizer", harmonizer_rank=2)


def test_layers_are_found_by_kind_and_shared_ones_by_their_source():
    plan = (ADAPTER, CUT, SHARED, HARMONIZER)
    check_plan(plan)
    assert layers_of(plan, "adapter", "shared") == [0, 2] and shared_layers(plan) == {2: 0}


def test_a_record_states_what_the_layer_has_and_nothing_else():
    assert CUT.model_dump(mode="json") == {"kind": "compressed", "ranks": {"q_proj": [3]}, "channels": 4}
    assert [layer.model_dump() for layer in (ADAPTER, HARMONIZER)] == [
        {"kind": "adapter"},
        {"kind": "harmonizer", "harmonizer_rank": 2},
    ]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ((HARMONIZER, Layer(kind="removed")), "no decoder layer is left"),
        ((Layer(kind="adapter", channels=3),), "layer 0 is cut"),
        ((CUT, Layer(kind="harmonizer")), "layer 1: harmonizers"),
        ((ADAPTER, Layer(kind="removed", harmonizer_rank=4)), "layer 1: harmonizers"),
        ((ADAPTER, Layer(kind="shared")), "layer 1: shared"),
        ((ADAPTER, Layer(kind="compressed", source=0)), "layer 1: shared"),
        ((SHARED, ADAPTER), "layer 0 is shared with layer 0"),
        ((ADAPTER, Layer(kind="shared", source=9)), "shared with layer 9"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(plan, reason):
    with pytest.raises(ValueError, match=reason):
        check_plan(plan)


@pytest.mark.parametrize(
    "field", [{"ranks": {"q": (0,)}}, {"channels": 0}, {"harmonizer_rank": -1}, {"source": -1}, {"beta": 0.8}]
)
def test_a_record_out_of_range_is_refused(field):
    with pytest.raises(ValidationError):
        Layer(kind="compressed", **field)
