"""Gradients of a model whose decoder layers stay on disk: one backward pass, from the last layer to the first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.models.families import decoder_layers, family
from scaleot_core.models.forward import Removed, Restart, hidden_of, hooks, swapped_layers
from scaleot_core.models.streaming import StreamedModel


class _Call(NamedTuple):
    """What a layer was called with: hidden states (B, T, D) first, then whatever the model gives it beside them."""

    args: tuple[Any, ...]
    named: dict[str, Any]


class BackwardPass:
    """A loss on blocks (N, T), and its gradient, which moves back through one layer at a time.

    Made by a forward pass through all layers. `through` is to be called for each of them, the last one first, while the
    layer has its weights; hooks on its modules then see what comes in and which gradient comes back, `batch_blocks` at
    once. Memory: the inputs of all layers, L · N · T · D numbers in the model's dtype, beside the embeddings and one
    layer.
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
        in_tuple = family(streamed.model.config).in_tuple
        self.gradients: list[Tensor] = []
        with streamed.without_layers() as model:
            for batch, state in zip(blocks.split(batch_blocks), last, strict=True):
                state.requires_grad_(True)
                skipped: dict[int, nn.Module] = dict.fromkeys(range(count - 1), Removed(in_tuple=in_tuple))
                with swapped_layers(model, {**skipped, count - 1: Restart(state, in_tuple=in_tuple)}):
                    loss(model, batch).backward()
                self.gradients.append(_gradient(state))

    def through(self, layer: nn.Module) -> None:
        """Move the gradient back through the next layer, which is run once more."""
        for k, (args, named) in enumerate(self.calls.pop()):
            state = args[0].detach().requires_grad_(True)
            hidden_of(layer(state, *args[1:], **named)).backward(self.gradients[k])
            self.gradients[k] = _gradient(state)


def _gradient(state: Tensor) -> Tensor:
    assert state.grad is not None
    return state.grad
