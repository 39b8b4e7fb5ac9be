"""Channel pruning: feed-forward channels cut in every layer, the down-projection refitted (method section 7).

Beyond the paper. Needs no scores and no harmonizers; what is tuned in it is mostly LoRA in every layer. Adapter layers,
if any, are those at the ends.
"""

from collections.abc import Iterator

from torch import Tensor

from scaleot_core.common.allocator import give_back_freed_memory
from scaleot_core.common.errors import UserError
from scaleot_core.compression.channels import prune_and_refit, pruned_share
from scaleot_core.compression.layer_choice import end_layers
from scaleot_core.compression.plan import ADAPTER, Layer, Plan
from scaleot_core.compression.rank_compression import target_rank
from scaleot_core.methods.base import BuiltEmulator, ModelOwner, largest_fitting
from scaleot_core.methods.covariances import covariances
from scaleot_core.models.families import feed_forward_name
from scaleot_core.settings import Channels

STEPS = 1000  # of the ratio that is searched for a budget


def plan(owner: ModelOwner) -> Plan:
    """Plan the channels of every layer from `channels`; with a `max_bytes_ratio`, from the smallest ratio that fits.

    UserError for a ratio of 0 without a budget.
    """
    settings, shapes = owner.params.channels, owner.shapes
    adapters = end_layers(shapes.layers, owner.params.adapter_layers)

    def pruned(ratio: float) -> Plan:
        asked = Channels.model_construct(ratio=ratio, tilt=settings.tilt)
        counts = [
            target_rank(shapes.channels, min(1.0, pruned_share(asked, i, shapes.layers))) for i in range(shapes.layers)
        ]
        return tuple(
            ADAPTER if i in adapters else Layer(kind="compressed", channels=count) for i, count in enumerate(counts)
        )

    if owner.params.max_bytes_ratio:
        return largest_fitting(owner, range(0, STEPS + 1), lambda size: pruned(1 - size / STEPS))
    if not settings.ratio:
        raise UserError(
            "the method channels cuts nothing then; raise it, or give a max_bytes_ratio",
            parameter="channels.ratio",
            value=settings.ratio,
        )
    return pruned(settings.ratio)


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build the emulator layer by layer."""
    channels_plan, channels = plan(owner), dict[int, Tensor]()
    return BuiltEmulator(channels_plan, layer_by_layer(owner, channels_plan, channels), channels)


def layer_by_layer(owner: ModelOwner, plan: Plan, channels: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the emulator's tensors by their names, and put into `channels` those that each pruned layer keeps.

    Of the model's layers no more than one is in memory.
    """
    give_back_freed_memory()
    streamed = owner.stream()
    inputs = covariances(owner, streamed, channels=True)
    yield from streamed.tensors(streamed.outside)
    for i, planned in enumerate(plan):
        with streamed.layer(i) as layer:
            if planned.channels is not None:
                covariance = inputs(i)[feed_forward_name(owner.config, i)]
                channels[i] = prune_and_refit(streamed.model, i, planned.channels, covariance, owner.within.get(i))
            yield from streamed.layer_tensors(i, layer)
