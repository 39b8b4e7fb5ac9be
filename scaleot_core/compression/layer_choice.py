"""Which layers are shipped whole, replaced or cut: ScaleOT's choice by scores, α and β (method section 3)."""

import math
from collections.abc import Mapping, Sequence

from scaleot_core.common.errors import UserError
from scaleot_core.common.validation import check_range
from scaleot_core.compression.channels import pruned_share
from scaleot_core.compression.plan import ADAPTER, Layer, Plan
from scaleot_core.compression.rank_compression import round_half_up, target_rank
from scaleot_core.compression.shapes import LayerShapes
from scaleot_core.params import Params


def end_layers(total: int, count: int) -> set[int]:
    """Choose the `count` layers at the ends of a stack of `total`; the bottom has the odd one (OT's placement)."""
    bottom = math.ceil(count / 2)
    return {*range(bottom), *range(total - (count - bottom), total)}


def choose_layers(
    scores: Sequence[float], *, adapter_layers: int, replaced: int, placement: str
) -> tuple[set[int], set[int]]:
    """Choose the adapter layers, and the `replaced` layers for harmonizers, by score.

    Placement "importance" takes the layers of highest score as adapter layers, "ends" those of `end_layers`.
    Harmonizers replace the other layers of lowest score.
    """
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    adapters = set(ranked[:adapter_layers]) if placement == "importance" else end_layers(len(scores), adapter_layers)
    others = [i for i in ranked if i not in adapters]
    return adapters, set(others[len(others) - replaced :])


def ranks_left(shapes: LayerShapes, beta: float) -> dict[str, tuple[int, ...]]:
    """Return the ranks that β leaves of the matrices in every attention projection that it cuts."""
    ranks = {
        name: tuple(target_rank(min(shape), beta) for shape in matrices)
        for name, matrices in shapes.projections.items()
    }
    return cut_ranks(ranks, shapes)


def compressed_layer(params: Params, shapes: LayerShapes, index: int) -> Layer:
    """Plan a compressed layer by β, which cuts the attention ranks, and by the block `channels`."""
    kept = target_rank(shapes.channels, pruned_share(params.channels, index, shapes.layers))
    return Layer(
        kind="compressed", ranks=ranks_left(shapes, params.beta), channels=kept if params.channels.ratio else None
    )


def cut_ranks(ranks: Mapping[str, tuple[int, ...]], shapes: LayerShapes) -> dict[str, tuple[int, ...]]:
    """Leave out the projections of which nothing is cut."""
    return {
        name: cut
        for name, cut in ranks.items()
        if any(rank < min(shape) for rank, shape in zip(cut, shapes.projections[name], strict=True))
    }


def plan_for(params: Params, scores: Sequence[float], shapes: LayerShapes, *, replaced: int | None = None) -> Plan:
    """Plan ScaleOT's emulator: N_a adapter layers, then a share α of the others, rounded half up, as harmonizers.

    `replaced` counts harmonizers instead of α. UserError for more adapter layers than the model can give, and where no
    decoder layer is left.
    """
    total, adapter_layers = shapes.layers, params.adapter_layers
    check_range("adapter_layers", adapter_layers, total, least=0, most=total - 1)
    if replaced is None:
        replaced = round_half_up(params.alpha * (total - adapter_layers))
    if replaced == total:
        raise UserError(
            "with adapter_layers = 0 it leaves no decoder layer to tune; lower it",
            parameter="alpha",
            value=params.alpha,
        )
    adapters, harmonizers = choose_layers(
        scores, adapter_layers=adapter_layers, replaced=replaced, placement=params.adapter_placement
    )
    harmonizer = Layer(kind="harmonizer", harmonizer_rank=params.harmonizer.rank)
    return tuple(
        ADAPTER if i in adapters else harmonizer if i in harmonizers else compressed_layer(params, shapes, i)
        for i in range(total)
    )
