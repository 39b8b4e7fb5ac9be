import pytest
import torch
from helpers import streamed, tiny_model, trained_harmonizers, weights_hash

from scaleot_core.compression import local_fit
from scaleot_core.compression.harmonizer import Harmonizer
from scaleot_core.compression.layer_importance import new_harmonizers, sensitivity
from scaleot_core.compression.local_fit import fit_locally
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import hidden_of, hidden_states, next_token_loss, swapped_layers
from scaleot_core.training.checkpoint import Checkpoint


def naive(h: Harmonizer, x: torch.Tensor) -> torch.Tensor:
    """h(x) = x + W_up · ReLU(W_down · x + b_down) + b_up, written as the equation."""
    hidden = torch.clamp(x @ h.down.weight.T + h.down.bias, min=0)
    return x + hidden @ h.up.weight.T + h.up.bias


def test_equals_the_equation():
    h = Harmonizer(32, 8)
    x = torch.randn(2, 5, 32) * 3
    torch.testing.assert_close(h(x), naive(h, x))


def test_untrained_is_the_identity_and_every_matrix_gets_a_gradient_in_two_steps(model, blocks):
    harmonizers = new_harmonizers(model.config, 8, seed=0)
    before = {name: p.clone() for name, p in harmonizers[1].named_parameters()}
    x = torch.randn(1, 3, 32)
    assert torch.equal(hidden_of(harmonizers[1](x)), x)
    optimizer = torch.optim.SGD(harmonizers[1].parameters(), lr=0.1)
    for _ in range(2):  # with W_up at zero the first step moves W_up, the second W_down as well
        with swapped_layers(model, {1: harmonizers[1]}):
            next_token_loss(model, blocks[:4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(before[name], p) for name, p in harmonizers[1].named_parameters())


def test_takes_and_returns_what_a_decoder_layer_does(model, blocks):
    """The model's own forward runs with all layers but one replaced, with a mask and generating with a cache."""
    harmonizers = trained_harmonizers(model)
    stand_ins = dict(enumerate(harmonizers))
    stand_ins.pop(0)
    with swapped_layers(model, stand_ins):
        ids = blocks[:2].long()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert logits.shape == (2, 16, model.config.vocab_size)
        cached = model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
        plain = model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)


def test_hidden_states_are_what_the_model_computes(model, blocks):
    states = hidden_states(model, blocks[:3], batch_blocks=2)
    reference = model(input_ids=blocks[:3].long(), output_hidden_states=True).hidden_states
    assert len(states) == 5
    for mine, theirs in zip(states[:-1], reference[:-1], strict=True):  # its last one is behind the final norm
        torch.testing.assert_close(mine, theirs.flatten(0, 1))


def on_disk(model, folder):
    model.save_pretrained(folder, save_original_format=False)
    return streamed(folder)


FITS = {"lr": 3e-3, "seed": 0}


@pytest.mark.slow
def test_local_fit_approaches_the_layer(model, blocks, tmp_path):
    harmonizers = new_harmonizers(model.config, 8, seed=0)
    history = fit_locally(on_disk(model, tmp_path), harmonizers, blocks, steps=150, **FITS)
    assert [row["step"] for row in history] == [*range(150)] and history[-1]["loss"] < 0.9 * history[0]["loss"]
    states = hidden_states(model, blocks)
    for i, h in enumerate(harmonizers):
        target = states[i + 1]
        assert (hidden_of(h(states[i])) - target).square().mean() < (states[i] - target).square().mean()


def test_fit_stopped_between_layers_goes_on_to_the_same_bytes(tmp_path, blocks, monkeypatch):
    model = tiny_model("llama")
    stored = on_disk(model, tmp_path / "model")
    whole, begins, goes_on = (new_harmonizers(model.config, 8, seed=0) for _ in range(3))
    history = fit_locally(stored, whole, blocks, steps=6, **FITS)
    checkpoint, run, begun = Checkpoint(tmp_path / "fits", 0), local_fit.run_steps, []

    def stops_at_the_third(*args, label, **options):
        begun.append(label)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return run(*args, label=label, **options)

    monkeypatch.setattr(local_fit, "run_steps", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fit_locally(stored, begins, blocks, steps=6, checkpoint=checkpoint, **FITS)
    assert fit_locally(stored, goes_on, blocks, steps=6, checkpoint=checkpoint, **FITS) == history
    assert begun[3:] == ["local fit 3 of 4", "local fit 4 of 4"]
    assert weights_hash(goes_on) == weights_hash(whole)


def test_sensitivity_is_the_loss_of_replacing_one_layer(model, blocks):
    harmonizers = trained_harmonizers(model)
    costs = sensitivity(model, harmonizers, blocks)
    layers = decoder_layers(model)
    original = layers[2]
    layers[2] = harmonizers[2]
    with torch.no_grad():
        hurt = next_token_loss(model, blocks).item()
    layers[2] = original
    with torch.no_grad():
        whole = next_token_loss(model, blocks).item()
    assert costs[2] == pytest.approx(hurt - whole, abs=1e-5)
