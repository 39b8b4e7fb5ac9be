"""Gradients of a model whose decoder layers stay on disk: one backward pass, from the last layer to the first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import hidden_of, hooks, restarted
from scaleot_core.models.streaming import StreamedModel


class _Call(NamedTuple):
    """What a layer was called with: hidden states (B, T, D) first, then whatever the model gives it beside them."""

    args: tuple[Any, ...]
    named: dict[str, Any]


class BackwardPass:
    """The gradient of a loss on blocks (N, T), which moves back through one decoder layer at a time.

    The loss is summed over batches of `batch_blocks`. Making one runs all layers forward. Then `through` is called for
    the last layer, the one before, and so on, as far down as gradients are needed, each time while the layer has its
    weights: hooks on its modules see what comes in and which gradient comes back. Memory, beside the embeddings and a
    layer: the inputs of the layers that are left and one gradient, up to (L + 2) · N · T · D numbers in the model's
    dtype, and a batch's logits.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        blocks: Tensor,
        loss: Callable[[PreTrainedModel, Tensor], Tensor],
        batch_blocks: int,
    ) -> None:
        count = len(decoder_layers(streamed.model))
        self.calls: list[list[_Call]] = [[] for _ in range(count)]
        last: list[Tensor] = []

        @contextmanager
        def keep(i: int, layer: nn.Module) -> Iterator[None]:
            handles = [
                layer.register_forward_pre_hook(
                    lambda module, args, named: self.calls[i].append(_Call(args, named)), with_kwargs=True
                )
            ]
            if i == count - 1:
                handles.append(layer.register_forward_hook(lambda module, args, out: last.append(hidden_of(out))))
            with hooks(*handles):
                yield

        streamed.run(blocks, keep, batch_blocks)
        self.gradients: list[Tensor] = []
        with streamed.without_layers() as model, torch.enable_grad():
            for batch, state in zip(blocks.split(batch_blocks), last, strict=True):
                state.requires_grad_(True)
                with restarted(model, count - 1, state):
                    loss(model, batch).backward()
                self.gradients.append(_gradient(state))

    def through(self, index: int, layer: nn.Module) -> None:
        """Run a layer once more, and move the gradient back through it; ValueError where another layer is next."""
        if index != len(self.calls) - 1:
            raise ValueError(f"the gradient is behind layer {len(self.calls) - 1}, and layer {index} is given")
        for k, (args, named) in enumerate(self.calls.pop()):
            state = args[0].detach().requires_grad_(True)
            with torch.enable_grad():
                hidden_of(layer(state, *args[1:], **named)).backward(self.gradients[k])
            self.gradients[k] = _gradient(state)


def _gradient(state: Tensor) -> Tensor:
    assert state.grad is not None
    return state.grad
