"""Who has several packages, or a relative of the model, starts from all that they have together."""

import pytest
import torch
from helpers import (
    CPU,
    close,
    each_family,
    emulator_of,
    logits,
    make_emulator,
    plan_of,
    plan_of_kinds,
    tiny_model,
    write_package,
)

from scaleot_core.attacks.several import graft, unite
from scaleot_core.attacks.targets import targets
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression.channels import channels_of, prune_channels
from scaleot_core.exchange.package import Package
from scaleot_core.methods import ModelOwner
from scaleot_core.models.families import decoder_layers, family, feed_forward_paths
from scaleot_core.params import changed
from scaleot_core.training.checkpoint import Checkpoint


def pruned(name, kept, adapter):
    """Make a package of whole attention that keeps these channels, refitted to nothing, but for one whole layer."""
    model = tiny_model(name)
    plan = plan_of_kinds(["adapter" if i == adapter else "compressed" for i in range(4)])
    for i in {*range(4)} - {adapter}:
        prune_channels(model, i, kept)
    cut = {"channels": len(kept)}
    return model, tuple(layer if i == adapter else layer.model_copy(update=cut) for i, layer in enumerate(plan))


@each_family
def test_packages_that_have_everything_together_are_the_model(name):
    channels = torch.arange(channels_of(tiny_model(name), 0))
    parts = [pruned(name, channels[:40], 1), pruned(name, channels[24:], 2)]
    united = unite(parts, len(channels), seed=0)
    close(logits(united), logits(tiny_model(name)))
    assert united.num_parameters() == tiny_model(name).num_parameters()


@each_family
def test_layers_that_one_package_lacks_are_the_others(name):
    """One has harmonizers or cut attention where the other has whole layers."""
    parts = []
    for kinds in (
        ("adapter", "harmonizer", "compressed", "adapter"),
        ("compressed", "adapter", "adapter", "harmonizer"),
    ):
        model = tiny_model(name)
        parts.append((model, make_emulator(model, plan_of(model, plan_of_kinds(kinds)))))
    close(logits(unite(parts, 0, seed=0)), logits(tiny_model(name)))


def test_missing_channels_are_fresh_and_change_nothing_at_the_start():
    channels = torch.arange(64)
    (model, plan), (alone, _) = pruned("llama", channels[:40], 1), pruned("llama", channels[:40], 1)
    united = unite([(model, plan)], 64, seed=0)
    close(logits(united), logits(alone))
    assert channels_of(united, 0) == 64 and united.get_submodule("model.layers.0.mlp.up_proj").weight[40:].std() > 0


@each_family
def test_sibling_gets_what_the_package_has_and_keeps_its_own_elsewhere(name):
    """The sibling differs in all but the direction of a channel's rows, by which they are told apart."""
    real, sibling, kept = tiny_model(name), tiny_model(name), torch.tensor([1, 5, 6, 30])
    emulator, plan = pruned(name, kept, 1)
    for parameter in sibling.parameters():
        parameter.data.mul_(1.5)
    graft(sibling, emulator, plan)
    state, names = real.state_dict(), family(real.config)
    rows = {f"{names.layers}.{i}.{inner}" for i in (0, 2, 3) for inner in feed_forward_paths(real.config)}
    for key, tensor in sibling.state_dict().items():
        if key.rpartition(".")[0] not in rows:
            assert torch.equal(tensor, state[key]), key
    down = f"{names.layers}.0.{names.feed_forward_out}.weight"
    assert torch.equal(sibling.state_dict()[down], 1.5 * state[down])
    first, fused = next(iter(names.feed_forward_in.items()))
    layers = (decoder_layers(model)[0].get_submodule(first) for model in (sibling, real))
    grafted, whole = (layer.weight.T if names.transposed else layer.weight for layer in layers)
    same = (grafted == whole).all(1).nonzero().flatten().tolist()
    assert same == [c + k * len(whole) // fused for k in range(fused) for c in kept.tolist()]


def test_cut_projections_of_a_package_are_not_grafted():
    sibling, emulator = tiny_model("llama"), emulator_of("llama")
    real = tiny_model("llama")
    graft(sibling, emulator, plan_of(real))
    assert logits(sibling).equal(logits(real))


@pytest.mark.parametrize("named", ["beside", "sibling"])
def test_attackers_come_where_they_are_named(named, params, tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model", save_original_format=False)
    package = Package(write_package(tmp_path / "package", tiny_model("llama"), tokenizer))
    whole = write_package(tmp_path / "whole", tiny_model("llama"), tokenizer, plan_of_kinds(["adapter"] * 4))
    value = [str(whole)] if named == "beside" else str(tmp_path / "model")
    params = changed(params, {f"attack.{named}": value})
    none = Checkpoint(tmp_path / "none", 1e9)
    owner = ModelOwner(
        tmp_path / "model", Runtime(CPU, torch.float32), torch.zeros(1, 4), params, tmp_path, tmp_path / "scratch", none
    )
    attackers = targets(package, owner, lambda: tiny_model("llama"))
    assert {"collusion", "sibling"} & attackers.keys() == {"collusion" if named == "beside" else "sibling"}
    close(logits(attackers["collusion" if named == "beside" else "sibling"].load()), logits(tiny_model("llama")))
