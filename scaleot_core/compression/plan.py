"""The layer plan: what becomes of every decoder layer (method section 3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.common.validation import check_range
from scaleot_core.compression.channels import channels_of
from scaleot_core.compression.rank_compression import round_half_up, target_rank, target_ranks
from scaleot_core.params import Params
from scaleot_core.settings import HarmonizerForm, Positive

LayerKind = Literal["adapter", "harmonizer", "compressed", "removed", "shared"]
DECODER_KINDS: tuple[LayerKind, ...] = ("adapter", "compressed", "shared")  # kinds that are still decoder layers


class Cut(BaseModel):
    """How far one compressed layer is cut, where β doesn't say it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranks: Annotated[dict[str, tuple[Positive, ...]], Field(max_length=4)]
    """Of the matrices in each attention projection, by its name in the attention."""
    channels: Positive
    """Of the feed-forward part."""


@dataclass(frozen=True)
class Plan:
    """What becomes of every decoder layer, and how hard the compressed ones are cut."""

    kinds: tuple[LayerKind, ...]
    beta: float
    harmonizer: HarmonizerForm
    like: Mapping[int, int] = field(default_factory=dict)
    """Whose weights, as they are shipped, each shared layer has."""
    cuts: Mapping[int, Cut] = field(default_factory=dict)
    """Of compressed layers that aren't cut by β."""

    def __post_init__(self) -> None:
        """Raise ValueError for a plan that contradicts itself."""
        for what, found, kind in (("like", self.like, "shared"), ("cuts", self.cuts, "compressed")):
            for i in found:
                if not (0 <= i < len(self.kinds) and self.kinds[i] == kind):
                    raise ValueError(f"`{what}` has layer {i}, which is not {kind}")
        for i in self.layers("shared"):
            if self.like.get(i) not in (*self.layers("compressed"), *self.layers("adapter")):
                raise ValueError(f"layer {i} is shared with no layer that is there")

    def layers(self, kind: LayerKind) -> list[int]:
        """List the indices of the layers of one kind, ascending."""
        return [i for i, k in enumerate(self.kinds) if k == kind]

    def ranks(self, model: PreTrainedModel, index: int) -> Mapping[str, Sequence[int]]:
        """Give the ranks that one compressed layer's attention projections are cut to, by the projection's name."""
        cut = self.cuts.get(index)
        return cut.ranks if cut else target_ranks(model, index, beta=self.beta)


def choose_layers(
    scores: Sequence[float], *, adapter_layers: int, alpha: float, placement: str
) -> tuple[LayerKind, ...]:
    """Choose every layer's kind by its score: N_a adapter layers, then a share α of the others as harmonizers.

    Placement "importance" takes the layers of highest score, "ends" the two bottom and two top ones of N_a = 4 (the
    bottom has the odd one). Harmonizers replace the other layers of lowest score; their number is rounded half up.
    UserError for more adapter layers than the model can give.
    """
    check_range("adapter_layers", adapter_layers, len(scores), least=0, most=len(scores) - 1)
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if placement == "ends":
        bottom = math.ceil(adapter_layers / 2)
        adapters = {*range(bottom), *range(len(scores) - (adapter_layers - bottom), len(scores))}
    else:
        adapters = set(ranked[:adapter_layers])
    others = [i for i in ranked if i not in adapters]
    replaced = set(others[len(others) - round_half_up(alpha * len(others)) :])
    return tuple(
        "adapter" if i in adapters else "harmonizer" if i in replaced else "compressed" for i in range(len(scores))
    )


def plan_for(params: Params, scores: Sequence[float], model: PreTrainedModel) -> Plan:
    """Plan a model's layers from the parameters and the layers' scores. The model needs no weights."""
    kinds = choose_layers(
        scores, adapter_layers=params.adapter_layers, alpha=params.alpha, placement=params.adapter_placement
    )
    if not set(kinds) & set(DECODER_KINDS):
        raise UserError(
            "with adapter_layers = 0 it leaves no decoder layer to tune; lower it",
            parameter="alpha",
            value=params.alpha,
        )
    decided = Plan(kinds, params.beta, params.harmonizer)
    if not params.channel_pruning.ratio:
        return decided
    cuts = {
        i: Cut(
            ranks={name: tuple(ranks) for name, ranks in decided.ranks(model, i).items()},
            channels=target_rank(channels_of(model, i), params.channel_pruning.of_layer(i, len(kinds))),
        )
        for i in decided.layers("compressed")
    }
    return replace(decided, cuts=cuts)
