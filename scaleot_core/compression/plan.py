"""The layer plan: what becomes of every decoder layer (method section 3). A package's manifest states it as it is."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from scaleot_core.settings import Count, Positive

LayerKind = Literal["adapter", "harmonizer", "compressed", "removed", "shared"]
DECODER_KINDS: tuple[LayerKind, ...] = ("adapter", "compressed", "shared")  # kinds that are still decoder layers


class Layer(BaseModel):
    """What becomes of one decoder layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: LayerKind
    """adapter: shipped whole, and tuned; harmonizer: replaced; compressed: frozen, cut or whole; removed; shared."""
    ranks: Annotated[dict[str, tuple[Positive, ...]], Field(max_length=4, exclude_if=lambda ranks: not ranks)] = {}
    """Ranks of the matrices in each attention projection that is cut, by its name in the attention."""
    channels: Annotated[Positive | None, Field(exclude_if=lambda count: count is None)] = None
    """Feed-forward channels that are kept, where not all are."""
    harmonizer_rank: Annotated[Positive | None, Field(exclude_if=lambda rank: rank is None)] = None
    """The rank r of the harmonizer in its place."""
    source: Annotated[Count | None, Field(exclude_if=lambda source: source is None)] = None
    """The layer whose weights, as they are shipped, a shared one has."""


Plan = tuple[Layer, ...]
ADAPTER, COMPRESSED, REMOVED = Layer(kind="adapter"), Layer(kind="compressed"), Layer(kind="removed")


def check_plan(plan: Plan) -> None:
    """Raise ValueError for a plan that contradicts itself, or leaves no decoder layer."""
    if not any(layer.kind in DECODER_KINDS for layer in plan):
        raise ValueError("no decoder layer is left to tune")
    for i, layer in enumerate(plan):
        if (layer.ranks or layer.channels) and layer.kind != "compressed":
            raise ValueError(f"layer {i} is cut, and not of the kind compressed")
        if (layer.harmonizer_rank is None) == (layer.kind == "harmonizer"):
            raise ValueError(f"layer {i}: harmonizers, and they alone, have a harmonizer_rank")
        if (layer.source is None) == (layer.kind == "shared"):
            raise ValueError(f"layer {i}: shared layers, and they alone, have a source")
        if layer.source is not None and (
            layer.source >= len(plan) or plan[layer.source].kind not in ("adapter", "compressed")
        ):
            raise ValueError(f"layer {i} is shared with layer {layer.source}, which is not shipped")


def layers_of(plan: Plan, *kinds: LayerKind) -> list[int]:
    """List the indices of the layers of some kinds, ascending."""
    return [i for i, layer in enumerate(plan) if layer.kind in kinds]


def shared_layers(plan: Plan) -> dict[int, int]:
    """Return the source of every shared layer, by index."""
    return {i: layer.source for i, layer in enumerate(plan) if layer.source is not None}
