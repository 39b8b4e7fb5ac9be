"""CRaSh: neighbouring layers clustered, all but one of each removed, the nearest one left shared in their place.

Source: Zhang et al., EMNLP 2023, as in github.com/TsinghuaC3I/CRaSh. Its text was not at hand; from the code: clusters
by linear CKA of the layers' outputs, pooled over tokens with weights 1, 2, …; the centre of a cluster stays; adapter
layers are centres at even distances in the list of centres, which all but one of its scripts follow; a removed layer's
place is taken by the nearest centre, the right one of two ("repeat-all"). It clusters on questions of the task or on
WikiText; here it is the public corpus, since the task's questions are not the model owner's.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from scaleot_core.compression.plan import ADAPTER, COMPRESSED, Layer, Plan
from scaleot_core.methods.base import BuiltEmulator, ModelOwner, largest_fitting
from scaleot_core.models.forward import hidden_of, hooks
from scaleot_core.models.streaming import StreamedModel

CALIBRATION_BLOCKS = 256  # training blocks on which layers are compared


def representations(streamed: StreamedModel, blocks: Tensor) -> list[Tensor]:
    """Pool each decoder layer's output over the tokens of a block with weights 1, 2, …: L tensors (N, D)."""
    weights = torch.arange(1, blocks.shape[1] + 1, device=streamed.device).float()
    weights /= weights.sum()
    pooled: list[Tensor] = []

    @contextmanager
    def around(i: int, layer: nn.Module) -> Iterator[None]:
        parts: list[Tensor] = []

        def pool(module: nn.Module, args: object, out: Tensor) -> None:
            parts.append(torch.einsum("t,btd->bd", weights, hidden_of(out).float()))

        with hooks(layer.register_forward_hook(pool)):
            yield
        pooled.append(torch.cat(parts))

    streamed.run(blocks, around)
    return pooled


def cka(x: Tensor, y: Tensor) -> float:
    """Compute the linear centred kernel alignment of two representations (N, D) of the same samples, 0 to 1."""
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def centres(similarities: list[float], count: int) -> list[int]:
    """Choose the layers that stay of `count` clusters, from the similarity of each layer to the next.

    Merging the most similar neighbours until `count` clusters are left is cutting at the least similar ones.
    """
    order = sorted(range(len(similarities)), key=lambda i: (similarities[i], -i))
    cuts = [0, *(i + 1 for i in sorted(order[: count - 1])), len(similarities) + 1]
    return [(start + end) // 2 for start, end in pairwise(cuts)]


def adapters(kept: list[int], count: int) -> list[int]:
    """Choose the adapter layers among those that stay, at even distances, first and last included."""
    if count == 1:
        return kept[:1]
    return [kept[math.ceil(i * (len(kept) - 1) / (count - 1))] for i in range(count)]


def nearest(kept: list[int], layer: int) -> int:
    """Find the layer to use in place of a removed one: the nearest that stays, of two the right one."""
    return min(kept, key=lambda i: (abs(i - layer), -i))


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build the emulator: the centres of clusters, shared in place of the others."""
    blocks = owner.blocks[:CALIBRATION_BLOCKS]
    similarities = [cka(x, y) for x, y in pairwise(representations(owner.stream(), blocks))]
    total, tuned = len(similarities) + 1, owner.params.adapter_layers

    def keeping(count: int) -> Plan:
        layers = centres(similarities, count)
        tuned_layers = set(adapters(layers, tuned))
        return tuple(
            ADAPTER
            if i in tuned_layers
            else COMPRESSED
            if i in layers
            else Layer(kind="shared", source=nearest(layers, i))
            for i in range(total)
        )

    return owner.emulator_of_whole_layers(largest_fitting(owner, range(tuned + 1, total + 1), keeping))
