"""The emulator: what becomes of each layer, and what of it is an adapter's."""

import pytest
import torch
from helpers import (
    CPU,
    IDS,
    PLAN,
    WHOLE,
    each_family,
    each_head,
    emulator_of,
    give_harmonizers,
    make_emulator,
    plan_of,
    plan_of_kinds,
    tiny_model,
    trained_harmonizers,
    write_package,
)

from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import swapped_layers


@each_family
@each_head
def test_alpha_and_beta_at_zero_give_the_model_itself(name, tied):
    whole = tiny_model(name, tie_word_embeddings=tied)(IDS).logits
    assert torch.equal(emulator_of(name, WHOLE, tie_word_embeddings=tied)(IDS).logits, whole)
    assert not torch.allclose(emulator_of(name, tie_word_embeddings=tied)(IDS).logits, whole)


@each_family
def test_harmonizers_that_were_given_stand_in_for_their_own_layers(name):
    real, model = tiny_model(name), tiny_model(name)
    harmonizers = trained_harmonizers(model)
    plan = plan_of_kinds(("harmonizer", "adapter", "compressed", "harmonizer"))
    give_harmonizers(model, plan, harmonizers)
    with swapped_layers(real, {i: harmonizers[i] for i in (0, 3)}):
        assert torch.equal(model(IDS).logits, real(IDS).logits)


@pytest.mark.parametrize("plan", [PLAN, plan_of_kinds(("compressed", "harmonizer", "adapter", "harmonizer"))])
@each_family
def test_generation_with_a_cache_equals_generation_without(tmp_path, tokenizer, name, plan):
    real = tiny_model(name)
    model = Package(write_package(tmp_path / "package", real, tokenizer, plan_of(real, plan))).load(CPU)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached, uncached = (model.generate(IDS, **options, use_cache=use) for use in (True, False))
    assert cached.shape == (1, 20) and torch.equal(cached, uncached)
    begun = model(IDS[:, :3], use_cache=True)
    rest = model(IDS[:, 3:], past_key_values=begun.past_key_values).logits  # many tokens at once, after some
    torch.testing.assert_close(rest, model(IDS, use_cache=False).logits[:, 3:])


# --- adapter layers --------------------------------------------------------------------------------------


def test_parameters_of_a_kind_are_those_of_its_layers_and_no_others(model):
    make_emulator(model)
    found = layer_parameters(model, PLAN, "adapter")
    assert {id(p) for p in found.values()} == {id(p) for p in decoder_layers(model)[1].parameters()}
    assert all(model.get_parameter(name) is p for name, p in found.items())
