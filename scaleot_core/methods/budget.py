"""What a method is given, and the size that its emulator is fitted to: equal bytes for all methods."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core import package
from scaleot_core.errors import UserError
from scaleot_core.importance import read_scores
from scaleot_core.params import Params
from scaleot_core.plan import Kind, Plan, plan_for
from scaleot_core.training import Checkpoint


@dataclass(frozen=True)
class Owner:
    """What the model owner has to make an emulator from."""

    model: PreTrainedModel
    """The real model, frozen, that becomes the emulator."""
    blocks: Tensor
    """Training blocks of the public corpus (N, T)."""
    params: Params
    harmonizers: Path
    """What stage train_harmonizers wrote: harmonizers and scores."""
    scratch: Path
    """Where what serves other runs too is kept."""
    checkpoint: Checkpoint

    def scores(self) -> list[float]:
        """The layers' scores."""
        return read_scores(self.harmonizers / "scores.json", self.model.config.num_hidden_layers)

    def plan(self, kinds: tuple[Kind, ...], **cuts: object) -> Plan:
        """A plan with these kinds, and nothing cut but what `cuts` say."""
        return Plan(kinds, 0.0, "removed", self.params.harmonizer, **cuts)  # type: ignore[arg-type]


def model_bytes(owner: Owner) -> int:
    """Bytes of the whole model's weights."""
    return package.plan_bytes(owner.model.config, owner.plan(("compressed",) * owner.model.config.num_hidden_layers))


def target_bytes(owner: Owner) -> int:
    """Most bytes that an emulator may have: `budget`, or, where that is 0, those of ScaleOT's at α and β."""
    if owner.params.budget:
        return int(owner.params.budget * model_bytes(owner))
    return package.plan_bytes(owner.model.config, plan_for(owner.params, owner.scores()))


def largest(owner: Owner, sizes: range, plan: Callable[[int], Plan]) -> int:
    """The largest size whose plan keeps to the target; UserError where the least one doesn't.

    Larger sizes have more bytes.
    """
    target = target_bytes(owner)

    def fits(size: int) -> bool:
        return package.plan_bytes(owner.model.config, plan(size)) <= target

    low, high = sizes.start, sizes.stop - 1
    if not fits(low):
        share = target / model_bytes(owner)
        raise UserError(
            f"params.yaml: method = {owner.params.method!r}: its least emulator has more than the budget of "
            f"{share:.0%} of the model's bytes; raise `budget`, or lower alpha or beta"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
