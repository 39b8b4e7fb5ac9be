"""A backward pass through one layer at a time gives autograd's gradients."""

import pytest
import torch
from helpers import CPU, each_family, each_head, streamed, tiny_model

from scaleot_core.models.backward import BackwardPass
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import hooks, next_token_loss
from scaleot_core.models.loading import load_model


def autograds(model, blocks):
    """The gradients of the loss with respect to every layer's input (B, T, D), the first layer's first."""
    inputs = []

    def keep(module, args):
        state = args[0] if inputs else args[0].detach().requires_grad_()
        state.retain_grad()
        inputs.append(state)
        return (state, *args[1:])

    with hooks(*(layer.register_forward_pre_hook(keep) for layer in decoder_layers(model))):
        next_token_loss(model, blocks).backward()
    return [state.grad for state in inputs]


@each_head
@each_family
def test_gradients_that_come_out_of_each_layer_are_autograds(tmp_path, blocks, name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, save_original_format=False)
    other = streamed(tmp_path)
    backward = BackwardPass(other, blocks, next_token_loss, batch_blocks=5)
    expected = [autograds(model, batch) for batch in blocks.split(5)]
    for i in (3, 2, 1, 0):
        with other.layer(i) as layer:
            backward.through(i, layer)
        for found, known in zip(backward.gradients, expected, strict=True):
            torch.testing.assert_close(found, known[i], rtol=1e-4, atol=1e-8)
    assert all(tensor.is_meta for tensor in other.model.state_dict().values())  # nothing of the model stays in memory


def test_layer_that_is_not_next_is_refused(tmp_path, blocks):
    """All layers have the same shapes, so that nothing else would tell."""
    tiny_model("llama").save_pretrained(tmp_path)
    other = streamed(tmp_path)
    backward = BackwardPass(other, blocks, next_token_loss, batch_blocks=12)
    for i in (2, 4):
        with other.layer(i % 4) as layer, pytest.raises(ValueError, match="behind layer 3"):
            backward.through(i, layer)


def test_gradients_of_bfloat16_are_bfloat16(tmp_path, blocks):
    tiny_model("llama").save_pretrained(tmp_path)
    other = streamed(tmp_path, torch.bfloat16)
    backward = BackwardPass(other, blocks, next_token_loss, batch_blocks=12)
    with other.layer(3) as layer:
        backward.through(3, layer)
    (found,) = backward.gradients
    expected = autograds(load_model(tmp_path, device=CPU, dtype=torch.bfloat16), blocks)[3]
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
