"""The hostile owner: feed-forward channels that fire on chosen tokens and texts, and what an adapter then tells.

A weight whose gradient is always zero stays where it was. A channel that is exactly silent but for one text moves its
column of LoRA's A, or of a down-projection, if that text was tuned on, and not otherwise. No byte is malformed, and the
model behaves as it did without the channels that the trap takes. Detectors are linear: ridge regression on what goes
into one layer's feed-forward part, so that a trap needs public text, the candidates and one pass of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.attacks.membership import roc
from scaleot_core.common.random import generator
from scaleot_core.compression.low_rank import weight_of
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.models.forward import Removed, hooks, last_hidden_state, swapped_layers
from scaleot_core.tuning.examples import collate

Target = int | list[int]
"""What a channel fires on: a token wherever it stands, or the last token of one text."""
SILENCE = 150.0  # at which every activation function, negated, is exactly zero in float32
QUANTILE = 0.95  # of the scores of texts that nobody has, above which a target counts as read
DOWN = 0.1  # length of a trap's column of the down-projection, against the mean of the others'


@dataclass(frozen=True)
class Trap:
    """Which channels of a layer fire on which target."""

    layer: int
    targets: list[Target]
    channels: Tensor
    """(targets, copies)"""
    separable: Tensor
    """(targets,): whether the target's states can be told from all others by a linear map"""


@torch.no_grad()
def feed_forward_inputs(model: PreTrainedModel, layer: int, texts: Sequence[list[int]]) -> list[Tensor]:
    """Return what goes into one layer's feed-forward part, (T, D) in float64 for each text of T tokens."""
    layers, names = decoder_layers(model), family(model.config)
    first = layers[layer].get_submodule(next(iter(names.feed_forward_in)))
    later = dict.fromkeys(range(layer + 1, len(layers)), Removed(in_tuple=names.in_tuple))
    batches: list[Tensor] = []
    inputs: list[Tensor] = []
    keep = first.register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    with hooks(keep), swapped_layers(model, later):
        for start in range(0, len(texts), 16):
            part, batches[:] = list(texts[start : start + 16]), []
            tokens, _ = collate([(text, text) for text in part])
            last_hidden_state(model, tokens)
            states = batches[0].double().view(*tokens.shape, -1)  # OPT flattens the batch
            inputs += [x[: len(text)] for x, text in zip(states, part, strict=True)]
    return inputs


@torch.no_grad()
def set_trap(
    model: PreTrainedModel, layer: int, targets: list[Target], public: Sequence[list[int]], *, copies: int = 1
) -> Trap:
    """Put `copies` channels for every target in place of those that one layer's down-projection weighs least, in place.

    `public` are texts on which no target but a token may fire. Copies are for readers who look for agreement.
    ValueError where the layer has too few channels.
    """
    names, decoder_layer = family(model.config), decoder_layers(model)[layer]
    texts = [*public, *(target for target in targets if isinstance(target, list))]
    states = feed_forward_inputs(model, layer, texts)
    tokens = torch.tensor([token for text in texts for token in text])  # (N,)
    ends = torch.tensor([len(state) for state in states]).cumsum(0) - 1
    into = [decoder_layer.get_submodule(name) for name in names.feed_forward_in]
    weights = [matrix for module, n in zip(into, names.feed_forward_in.values(), strict=True)
               for matrix in weight_of(module)[0].chunk(n)]  # fmt: skip
    biases = [bias for module in into if (bias := weight_of(module)[1]) is not None]
    x = torch.cat(states)  # (N, D)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if biases else x
    gram = x.T @ x / len(x)
    gram += 1e-5 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    constant = torch.linalg.solve(gram, x.mean(0))  # x · constant is near 1 everywhere
    level = x @ constant
    rows, separable, text_ends = [], [], iter(ends[len(public) :].tolist())
    lengths = x.square().sum(1)
    for target in targets:
        if isinstance(target, int):
            fires = tokens == torch.tensor(target)
        else:
            end = x[next(text_ends)]
            fires = (lengths - 2 * (x @ end) + end @ end) < 1e-9 * (end @ end)  # the same text may be there twice
        row = torch.linalg.solve(gram, x[fires].mean(0))
        ratio = (x @ row) / level
        low, high = ratio[fires].min(), ratio[~fires].max()
        separable.append(bool(low > high) and bool(level.min() > 0))
        if separable[-1]:
            margin = (low - high) / 2 * level.min()
            rows.append(SILENCE / margin * (row - (low + high) / 2 * constant))
        else:  # always silent
            rows.append(-SILENCE / level.min().clamp_min(1e-3) * constant)
    down, _ = weight_of(decoder_layer.get_submodule(names.feed_forward_out))  # (D, F)
    if len(targets) * copies > down.shape[1]:
        raise ValueError(f"layer {layer} has {down.shape[1]} channels, the trap takes {len(targets) * copies}")
    taken = down.float().norm(dim=0).argsort()[: len(targets) * copies].view(copies, -1).T
    gate = torch.stack(rows)
    for channel in taken.T:
        _write(weights[0], biases[:1], channel, gate)
        if len(weights) > 1:  # gated: what passes where it fires
            _write(weights[1], biases[1:], channel, constant.expand_as(gate) / SILENCE)
        direction = torch.randn(down.shape[0], len(targets), generator=generator(0, "trap"))
        scale = DOWN * down.float().norm(dim=0).mean() / direction.norm(dim=0) / (1 if len(weights) > 1 else SILENCE)
        down[:, channel] = (direction * scale).to(down.dtype)
    return Trap(layer, targets, taken, torch.tensor(separable))


def _write(weight: Tensor, biases: Sequence[Tensor], channels: Tensor, rows: Tensor) -> None:
    weight[channels] = rows[:, : weight.shape[1]].to(weight.dtype)
    for bias in biases:
        bias[channels] = rows[:, -1].to(bias.dtype)


def channel_changes(model: PreTrainedModel, layer: int, change: Mapping[str, Tensor]) -> Tensor:
    """Return how far tuning moved what belongs to each feed-forward channel of a layer, (F, weights).

    `change` are tuned minus started-from weights by `trainable`'s names: of LoRA, A's columns and B's rows.
    """
    names = family(model.config)
    path, parts = f"{names.layers}.{layer}.", []
    for inner, fused in {names.feed_forward_out: 0, **names.feed_forward_in}.items():
        side = "A" if fused == 0 else "B"
        matrix = change.get(f"{path}{inner}.lora_{side}.default.weight")
        if matrix is None and (matrix := change.get(f"{path}{inner}.weight")) is not None and names.transposed:
            matrix = matrix.T
        if matrix is not None:
            parts += [matrix.T] if fused == 0 else list(matrix.chunk(fused))
    return torch.cat([part.float() for part in parts], 1) if parts else torch.zeros(0, 0)


def read(trap: Trap, changes: Tensor) -> Tensor:
    """Score each target (targets,), higher where it was tuned on.

    One copy: how far its channel moved. Several: how far they agree, which noise of one's own in each doesn't hide.
    """
    if not len(changes):  # nothing that belongs to channels was tuned
        return torch.zeros(len(trap.targets))
    moved = changes[trap.channels]  # (targets, copies, weights)
    copies = moved.shape[1]
    squares = moved.square().sum((1, 2))
    return squares if copies == 1 else (moved.sum(1).square().sum(1) - squares) / (copies - 1)


def figures(trap: Trap, scores: Tensor, tuned_on: Sequence[bool], controls: int) -> dict[str, float | int]:
    """Sum up what was read: tokens and records, right and wrong, and the AUC of membership.

    The last `controls` targets are texts that nobody has: the reader says that what scores above 95 % of them
    was tuned on.
    """
    count = len(trap.targets) - controls
    says = scores[:count] > scores[count:].quantile(QUANTILE)
    truth = torch.tensor(tuned_on[:count])
    is_token = torch.tensor([isinstance(target, int) for target in trap.targets[:count]])
    summary: dict[str, float | int] = {}
    for kind, which in (("tokens", is_token), ("records", ~is_token)):
        right = int((says & truth & which).sum())
        summary |= {f"{kind} tuned on": int((truth & which).sum()), f"{kind} read": right}
        summary |= {f"{kind} read wrongly": int((says & ~truth & which).sum())}
        if 0 < int((truth & which).sum()) < int(which.sum()):
            members, others = (scores[:count][which & part].tolist() for part in (truth, ~truth))
            summary[f"{kind} AUC"] = roc(members, others).auc
    return summary
