from contextlib import ExitStack

import pytest
import torch
from helpers import projections, tiny_model

from scaleot_core.compression import svd
from scaleot_core.compression.svd import cached_factors, damped, decompose, input_covariances
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import last_hidden_state

SHAPES = [(32, 32), (16, 32), (32, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_error_is_the_tail_of_the_singular_values(shape, rank):
    weight = torch.randn(shape)
    left, right = decompose(weight)
    tail = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    approximation = left[:, :rank].double() @ right[:rank].double()
    assert (weight.double() - approximation).norm() == pytest.approx(tail.item(), rel=1e-4)
    assert torch.linalg.matrix_rank(approximation) == rank


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_error_in_the_outputs_is_the_tail_and_below_the_plain_one(shape):
    weight, inputs = torch.randn(shape), torch.randn(500, shape[1]) * torch.logspace(-1.5, 1.5, shape[1])
    covariance = inputs.T @ inputs / len(inputs)
    whitener = torch.linalg.cholesky(damped(covariance))

    def error(factors, rank):
        approximation = factors[0][:, :rank].double() @ factors[1][:rank].double()
        return ((weight.double() - approximation) @ whitener).norm().item()

    for rank in (1, 5, 15):
        tail = torch.linalg.svdvals(weight.double() @ whitener)[rank:].square().sum().sqrt()
        assert error(decompose(weight, covariance), rank) == pytest.approx(tail.item(), rel=1e-4)
        assert error(decompose(weight, covariance), rank) < error(decompose(weight), rank)


@pytest.mark.parametrize("weight", [torch.zeros(8, 16), torch.ones(16, 8)])
def test_matrix_without_full_rank_is_no_obstacle(weight):
    left, right = decompose(weight)
    assert left.isfinite().all() and right.isfinite().all()
    torch.testing.assert_close(left[:, :1] @ right[:1], weight)


def test_a_singular_covariance_is_no_obstacle():
    inputs = torch.randn(3, 16)
    left, right = decompose(torch.randn(8, 16), inputs.T @ inputs)
    assert left.isfinite().all() and right.isfinite().all()


def test_covariances_are_those_of_the_inputs(model, blocks):
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in projections(model).items()
    ]
    found = {}
    with ExitStack() as stack:
        inside = [
            stack.enter_context(input_covariances(model.config, i, layer))
            for i, layer in enumerate(decoder_layers(model))
        ]
        for batch in blocks.split(5):
            last_hidden_state(model, batch)
    for sums in inside:
        found |= sums
    for hook in hooks:
        hook.remove()
    assert found.keys() == projections(model).keys()
    for name, covariance in found.items():
        parts = [part.flatten(0, -2) for part in seen[name]]
        torch.testing.assert_close(covariance.float(), sum(x.T @ x for x in parts))


def test_each_matrix_is_decomposed_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(svd, "decompose", lambda *args: made.append(args) or decompose(*args))
    model = tiny_model("llama")
    name, module = next(iter(projections(model).items()))
    first = cached_factors(tmp_path)(name, 0, module.weight)
    again = cached_factors(tmp_path)(name, 0, module.weight.clone())
    assert len(made) == 1 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    cached_factors(tmp_path, {name: torch.eye(32)})(name, 0, module.weight)
    cached_factors(tmp_path)(name, 0, module.weight + 1)
    assert len(made) == 3  # other inputs and another matrix are decomposed anew
