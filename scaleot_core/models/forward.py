"""Run a model: hidden states, losses, and layers that are swapped or hooked for a while."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from scaleot_core.common.errors import UserError
from scaleot_core.models.families import decoder_layers, decoder_stack, family


class StandIn(nn.Module):
    """A module in a decoder layer's place: it takes what the layer takes, and returns what the layer returns."""

    def __init__(self, *, in_tuple: bool = False) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        """As the family has it."""

    def replacement(self, hidden_states: Tensor) -> Tensor:
        """Compute (B, T, D) from (B, T, D)."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        """Ignore all but the hidden states."""
        out = self.replacement(hidden_states)
        return (out, None) if self.in_tuple else out


class Removed(StandIn):
    """Stands where a layer was: hidden states (B, T, D) go through as they are."""

    def replacement(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return hidden_states


class Restart(StandIn):
    """Stands where a layer was: drops what comes and gives hidden states that are known from before."""

    def __init__(self, states: Tensor, *, in_tuple: bool = False) -> None:
        super().__init__(in_tuple=in_tuple)
        self.states = states

    def replacement(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.states


def hidden_of(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the hidden states in what a decoder layer returns."""
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def hooks(*handles: RemovableHandle) -> Iterator[None]:
    """Remove these hooks when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def swapped_layers(model: PreTrainedModel, stand_ins: Mapping[int, nn.Module]) -> Iterator[None]:
    """Replace some decoder layers, by index, for the length of a block."""
    layers = decoder_layers(model)
    originals = {i: layers[i] for i in stand_ins}
    try:
        for i, stand_in in stand_ins.items():
            layers[i] = stand_in
        yield
    finally:
        for i, original in originals.items():
            layers[i] = original


@contextmanager
def restarted(model: PreTrainedModel, index: int, states: Tensor) -> Iterator[None]:
    """Have the model, for the length of a block, begin with hidden states (B, T, D) that leave decoder layer `index`.

    No layer up to that one runs.
    """
    in_tuple = family(model.config).in_tuple
    skipped: dict[int, nn.Module] = dict.fromkeys(range(index), Removed(in_tuple=in_tuple))
    with swapped_layers(model, {**skipped, index: Restart(states, in_tuple=in_tuple)}):
        yield


def last_hidden_state(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """Compute the last hidden states (B, T, D) of tokens (B, T), without the head and without a key-value cache.

    `positions` (B, T) are those of the tokens, else 0, 1, 2 and so on; `visible` (B, T, T) says which token sees which,
    else each sees those before it and itself.
    """
    more: dict[str, Tensor] = {}
    if positions is not None:
        more["position_ids"] = positions.to(model.device)
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)
        more["attention_mask"] = mask[:, None].to(model.device)
    output: Tensor = model.base_model(
        input_ids=tokens.to(model.device).long(), use_cache=False, **more
    ).last_hidden_state
    return output


class _Given(nn.Module):
    """Stand in for the stack of decoder layers: return last hidden states that are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the hidden states, whatever comes in."""
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)  # type: ignore[arg-type]


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Compute the logits (N, V), in float32, of last hidden states (N, D), as the model's own forward does.

    This may be more than a product with the head: Gemma 2 caps logits, Granite divides them.
    """
    path = decoder_stack(model.config)
    stack = model.get_submodule(path)
    model.set_submodule(path, _Given(hidden[None]))
    try:
        nothing = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits: Tensor = model(input_ids=nothing, use_cache=False).logits[0].float()
    finally:
        model.set_submodule(path, stack)
    return logits


def next_token_loss(model: PreTrainedModel, blocks: Tensor, reduction: str = "mean") -> Tensor:
    """Compute the mean or sum of next-token cross-entropies (nats) of blocks (B, T), without a key-value cache."""
    blocks = blocks.to(model.device).long()
    logits = model(input_ids=blocks, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, blocks: Tensor, batch_blocks: int = 8) -> float:
    """Compute the mean next-token cross-entropy (nats) over blocks (N, T); its exponential is the perplexity."""
    total = 0.0
    for batch in blocks.split(batch_blocks):
        total += next_token_loss(model, batch).item() * len(batch)
    if not math.isfinite(total):
        raise UserError(f"the model's loss on the corpus is {total}; check its weights, or use dtype float32")
    return total / len(blocks)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, blocks: Tensor, batch_blocks: int = 8) -> list[Tensor]:
    """Collect the inputs of all decoder layers and the output of the last: L + 1 tensors (N·T, D), the model's dtype.

    Read by hooks, since `output_hidden_states` knows only a family's own layers. The model's head is not run.
    """
    layers = decoder_layers(model)
    kept: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def keep_input(i: int):  # type: ignore[no-untyped-def]
        return lambda module, args: kept[i].append(args[0].flatten(0, 1))

    handles = [layer.register_forward_pre_hook(keep_input(i)) for i, layer in enumerate(layers)]
    handles.append(
        layers[-1].register_forward_hook(lambda module, args, out: kept[-1].append(hidden_of(out).flatten(0, 1)))
    )
    with hooks(*handles):
        for batch in blocks.split(batch_blocks):
            last_hidden_state(model, batch)
    return [torch.cat(parts) for parts in kept]
