"""What a method is given, and the size that its emulator is fitted to: equal bytes for all methods."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression import emulator
from scaleot_core.compression.layer_importance import read_scores
from scaleot_core.compression.plan import LayerKind, Plan, plan_for
from scaleot_core.models.loading import empty_model, load_model, read_config
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.params import Params
from scaleot_core.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class BuiltEmulator:
    """An emulator as a method makes it."""

    plan: Plan
    tensors: Iterable[tuple[str, Tensor]]
    """What a package has of it, by its name in the model; to be gone through once."""
    channels: Mapping[int, Tensor] = field(default_factory=dict)
    """The numbers of the feed-forward channels that each pruned layer keeps, ascending; whole once `tensors` were gone
    through. They stay with the model owner."""


@dataclass(frozen=True)
class ModelOwner:
    """What the model owner has to make an emulator from."""

    folder: Path
    """Of the real model."""
    runtime: Runtime
    blocks: Tensor
    """Training blocks of the public corpus (N, T)."""
    params: Params
    harmonizers: Path
    """What stage train_harmonizers wrote: harmonizers and scores."""
    scratch: Path
    """Where what serves other runs too is kept."""
    checkpoint: Checkpoint
    count: Callable[[PreTrainedModel], None] = lambda model: None
    """What is called with every model before it runs, to count its tokens."""

    @cached_property
    def config(self) -> PretrainedConfig:
        """The real model's configuration, in the dtype that it computes in."""
        config = read_config(self.folder)
        config.dtype = self.runtime.dtype
        return config

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The real model without weights, to read shapes from."""
        return empty_model(self.config, self.runtime.dtype, buffers_too=True)

    def load(self) -> PreTrainedModel:
        """Load the real model, frozen."""
        model = load_model(self.folder, device=self.runtime.device, dtype=self.runtime.dtype)
        self.count(model)
        return model

    def stream(self) -> StreamedModel:
        """Open the real model with its layers left on disk."""
        streamed = StreamedModel(self.folder, self.config, device=self.runtime.device, dtype=self.runtime.dtype)
        self.count(streamed.model)
        return streamed

    def scores(self) -> list[float]:
        """Read the layers' scores; zeros where nothing hangs on them, so that such an emulator needs none."""
        params = self.params
        by_score = params.adapter_layers > 0 and params.adapter_placement == "importance"
        if not (params.alpha or params.max_bytes_ratio or by_score):
            return [0.0] * self.config.num_hidden_layers
        return read_scores(self.harmonizers / "scores.json", self.config.num_hidden_layers)

    def plan(self, kinds: tuple[LayerKind, ...], **cuts: object) -> Plan:
        """Make a plan with these kinds, in which only `cuts` are cut."""
        return Plan(kinds, 0.0, self.params.harmonizer, **cuts)  # type: ignore[arg-type]

    def emulator_of_whole_layers(self, plan: Plan) -> BuiltEmulator:
        """Make the emulator that has the layers of a plan as they are, read one tensor after the other."""
        streamed = self.stream()
        kept = [name for name in streamed.names if emulator.part_of(name, streamed.path, plan) in emulator.PARTS]
        return BuiltEmulator(plan, streamed.tensors(kept))


def model_bytes(owner: ModelOwner) -> int:
    """Count the bytes of the whole model's weights."""
    return emulator.plan_bytes(owner.config, owner.plan(("compressed",) * owner.config.num_hidden_layers))


def target_bytes(owner: ModelOwner) -> int:
    """Give the most bytes an emulator may have: by `max_bytes_ratio`, or, where that is 0, ScaleOT's at α and β."""
    if owner.params.max_bytes_ratio:
        return int(owner.params.max_bytes_ratio * model_bytes(owner))
    return emulator.plan_bytes(owner.config, plan_for(owner.params, owner.scores(), owner.outline))


def largest_fitting(owner: ModelOwner, sizes: range, plan: Callable[[int], Plan]) -> int:
    """Find the largest size whose plan keeps to the target; UserError where the smallest one doesn't.

    Larger sizes have more bytes.
    """
    target = target_bytes(owner)

    def fits(size: int) -> bool:
        return emulator.plan_bytes(owner.config, plan(size)) <= target

    low, high = sizes.start, sizes.stop - 1
    if not fits(low):
        share = target / model_bytes(owner)
        raise UserError(
            f"even its smallest emulator exceeds the budget of {share:.0%} of the model's bytes; "
            "raise `max_bytes_ratio`, or lower alpha or beta",
            parameter="method",
            value=owner.params.method,
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
