"""What a method starts from, and the size that its emulator is fitted to: equal bytes for all methods."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression import emulator
from scaleot_core.compression.layer_choice import plan_for
from scaleot_core.compression.layer_importance import read_scores
from scaleot_core.compression.plan import Plan
from scaleot_core.compression.shapes import LayerShapes, layer_shapes, plan_bytes
from scaleot_core.models.loading import empty_model, load_model, read_config
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.params import Params
from scaleot_core.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class BuiltEmulator:
    """An emulator as a method makes it."""

    plan: Plan
    tensors: Iterable[tuple[str, Tensor]]
    """(name, tensor) pairs that a package stores, by the model's names; a one-shot iterator."""
    channels: Mapping[int, Tensor] = field(default_factory=dict)
    """The feed-forward channels that each pruned layer keeps, ascending; filled while `tensors` is read. They stay with
    the model owner."""


@dataclass(frozen=True)
class ModelOwner:
    """What the model owner makes an emulator from."""

    folder: Path
    """The real model's folder."""
    runtime: Runtime
    blocks: Tensor
    """Training blocks of the public corpus (N, T)."""
    params: Params
    harmonizers: Path
    """The folder of stage train_harmonizers: harmonizers and scores."""
    scratch: Path
    """A folder for decompositions and covariances that later runs of the same code use again."""
    checkpoint: Checkpoint
    count: Callable[[PreTrainedModel], None] = lambda model: None
    """Called with every model before it runs, to count its tokens."""
    within: Mapping[int, Tensor] = field(default_factory=dict)
    """By layer the feed-forward channels among which those that are kept are chosen; without an entry among all."""

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

    @cached_property
    def shapes(self) -> LayerShapes:
        """The sizes of the real model's layers."""
        return layer_shapes(self.outline)

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
        """Read the layers' scores; UserError where they were not made."""
        return read_scores(self.harmonizers / "scores.json", self.config.num_hidden_layers)

    def emulator_of_whole_layers(self, plan: Plan) -> BuiltEmulator:
        """Make the emulator of a plan that cuts no layer, read one tensor after the other."""
        streamed = self.stream()
        names = [name for name in streamed.names if emulator.part_of(name, streamed.path, plan) in emulator.PARTS]
        return BuiltEmulator(plan, streamed.tensors(names))


def target_bytes(owner: ModelOwner) -> int:
    """Return the most bytes an emulator may have: by `max_bytes_ratio`, or, where that is 0, ScaleOT's at α and β."""
    if owner.params.max_bytes_ratio:
        return int(owner.params.max_bytes_ratio * owner.shapes.model_bytes)
    any_scores = [0.0] * owner.shapes.layers  # which layers are replaced doesn't change the bytes
    return plan_bytes(owner.shapes, plan_for(owner.params, any_scores, owner.shapes))


def largest_fitting(owner: ModelOwner, sizes: range, plan: Callable[[int], Plan]) -> Plan:
    """Return the plan of the largest size that keeps to the target; UserError where the smallest one doesn't.

    Larger sizes have more bytes.
    """
    target = target_bytes(owner)

    def fits(size: int) -> bool:
        return plan_bytes(owner.shapes, plan(size)) <= target

    low, high = sizes.start, sizes.stop - 1
    if not fits(low):
        share = target / owner.shapes.model_bytes
        raise UserError(
            f"even its smallest emulator exceeds the budget of {share:.0%} of the model's bytes; "
            "raise `max_bytes_ratio`, or lower alpha or beta",
            parameter="method",
            value=owner.params.method,
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return plan(low)
