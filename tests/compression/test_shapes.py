import math

import pytest
from helpers import CONFIGS, plan_of, plan_of_kinds, tiny_model

from scaleot_core.compression.emulator import meta_emulator, tensor_shapes
from scaleot_core.compression.plan import Layer
from scaleot_core.compression.shapes import layer_shapes, plan_bytes

KINDS = ("harmonizer", "adapter", "compressed", "removed", "shared")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_bytes_are_those_of_the_emulators_tensors(name, tied):
    model = tiny_model(name, num_hidden_layers=5, tie_word_embeddings=tied)
    shapes, plans = layer_shapes(model), [plan_of_kinds(["compressed"] * 5)]
    for beta in (0.1, 0.5, 0.8):  # at 0.1 two factors would be larger than the matrix
        plan = plan_of(model, plan_of_kinds(KINDS, {4: 2}), beta)
        plans += [plan, (*plan[:2], Layer(kind="compressed", ranks=plan[2].ranks, channels=40), *plan[3:])]
    for plan in plans:
        tensors = tensor_shapes(meta_emulator(model.config, plan, buffers_too=True), plan).values()
        assert plan_bytes(shapes, plan) == sum(4 * math.prod(shape) for part in tensors for shape, _ in part.values())
    assert plan_bytes(shapes, plans[0]) == shapes.model_bytes
