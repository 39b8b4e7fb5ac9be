"""What an attacker starts from who has more than the package: other packages of the model, or a public relative of it.

Layers, and feed-forward channels by their rows, are put together from what is there; nothing private is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.attacks.restoration import fresh_matrix, number_layers, widen
from scaleot_core.compression.channels import channel_rows, channels_of
from scaleot_core.compression.low_rank import linear, weight_of
from scaleot_core.compression.plan import Layer, Plan, layers_of
from scaleot_core.models.families import decoder_layers, family, feed_forward_paths


def _lacks(layer: Layer) -> int:
    """Rank a layer by what a package lacks of its attention: 0 for nothing."""
    return {"adapter": 0, "compressed": 1 if layer.ranks else 0, "shared": 2, "harmonizer": 3, "removed": 4}[layer.kind]


@torch.no_grad()
def unite(emulators: Sequence[tuple[PreTrainedModel, Plan]], channels: int, seed: int) -> PreTrainedModel:
    """Put the emulators of several packages of one model together, into the first one; all are widened.

    Each layer is that of the package that lacks least of it. Its feed-forward part has the channels of all packages,
    and is filled up to `channels` with fresh ones, whose columns of the down-projection are zero.
    """
    for model, plan in emulators:
        widen(model, plan)
    united, _ = emulators[0]
    layers = decoder_layers(united)
    for i in range(len(layers)):
        parts = [(decoder_layers(model)[i], plan[i]) for model, plan in emulators]
        layers[i] = min(parts, key=lambda part: _lacks(part[1]))[0]
        shipped = [(layer, planned) for layer, planned in parts if planned.kind in ("adapter", "compressed")]
        complete = next((layer for layer, planned in shipped if planned.channels is None), None)
        if complete is not None:
            for inner in feed_forward_paths(united.config):
                layers[i].set_submodule(inner, complete.get_submodule(inner))
        elif shipped:
            _join_channels(united, i, [layer for layer, _ in shipped], channels, seed)
    number_layers(united)
    return united.requires_grad_(False)


def _join_channels(united: PreTrainedModel, index: int, parts: Sequence[nn.Module], channels: int, seed: int) -> None:
    """Give a layer of the united model the feed-forward channels of all `parts`, each once, and fresh ones."""
    names, layer = family(united.config), decoder_layers(united)[index]
    first = next(iter(names.feed_forward_in))
    rows_of = [weight_of(part.get_submodule(first))[0] for part in parts]
    fused = names.feed_forward_in[first]
    chosen: list[list[int]] = []
    seen = set[bytes]()
    for rows in rows_of:
        vectors = [row.float().cpu().numpy().tobytes() for row in rows[: len(rows) // fused]]
        chosen.append([c for c, vector in enumerate(vectors) if vector not in seen])
        seen |= set(vectors)
    missing = channels - sum(map(len, chosen))
    modules = {}
    for into, fused in names.feed_forward_in.items():
        weights, biases = zip(*(weight_of(part.get_submodule(into)) for part in parts), strict=True)
        fresh = fresh_matrix(united, seed, "several", index, into, (fused, missing, weights[0].shape[1]))
        by_matrix = [weight.unflatten(0, (fused, -1))[:, new] for weight, new in zip(weights, chosen, strict=True)]
        weight = torch.cat([*by_matrix, fresh.to(weights[0])], dim=1).flatten(0, 1)
        bias = None
        if biases[0] is not None:
            pairs = zip(biases, chosen, strict=True)
            shipped = [vector.unflatten(0, (fused, -1))[:, new] for vector, new in pairs]
            bias = torch.cat([*shipped, shipped[0].new_zeros(fused, missing)], dim=1).flatten()
        modules[into] = linear(weight, bias)
    downs = [weight_of(part.get_submodule(names.feed_forward_out)) for part in parts]
    columns = [weight[:, new] for (weight, _), new in zip(downs, chosen, strict=True)]
    columns.append(columns[0].new_zeros(len(columns[0]), missing))
    modules[names.feed_forward_out] = linear(torch.cat(columns, dim=1), downs[0][1])
    for path, module in modules.items():
        layer.set_submodule(path, module)


@torch.no_grad()
def graft(sibling: PreTrainedModel, emulator: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Put into a public model of the same shapes, in place, all that a package of another has as it is.

    A pruned layer's channels replace the sibling's of the nearest rows, whose columns of the down-projection stay.
    """
    names, shipped = family(sibling.config), emulator.state_dict()
    cut = tuple(
        f"{names.layers}.{i}.{names.attention}.{name}." for i, planned in enumerate(plan) for name in planned.ranks
    )
    for name, parameter in sibling.named_parameters():
        tensor = shipped.get(name)
        if tensor is not None and tensor.shape == parameter.shape and not name.startswith(cut):
            parameter.copy_(tensor)
    for i in layers_of(plan, "compressed"):
        if plan[i].channels is None:
            continue
        nearest: Tensor | None = None
        for into, fused in names.feed_forward_in.items():
            (whole, bias), (rows, shipped_bias) = (
                weight_of(decoder_layers(model)[i].get_submodule(into)) for model in (sibling, emulator)
            )
            if nearest is None:
                count = channels_of(sibling, i)
                similar = nn.functional.normalize(rows[: len(rows) // fused].float(), dim=1) @ (
                    nn.functional.normalize(whole[:count].float(), dim=1).T
                )
                nearest = similar.argmax(1)
            at = channel_rows(nearest, count, fused)
            whole[at] = rows.to(whole)
            if bias is not None and shipped_bias is not None:
                bias[at] = shipped_bias.to(bias)
    return sibling
