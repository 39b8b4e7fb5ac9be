"""ScaleOT: harmonizers for the layers of least importance, Selective Rank Compression of the others (method 1 to 4).

With `channels.ratio` above 0 the compressed layers lose feed-forward channels too, beyond the paper.
"""

from collections.abc import Iterator

from torch import Tensor

from scaleot_core.common.allocator import give_back_freed_memory
from scaleot_core.common.progress import say
from scaleot_core.compression import layer_importance, svd
from scaleot_core.compression.channels import prune_and_refit
from scaleot_core.compression.harmonizer import Harmonizer
from scaleot_core.compression.layer_choice import plan_for
from scaleot_core.compression.plan import Plan, layers_of
from scaleot_core.compression.rank_compression import compress_layer
from scaleot_core.methods.base import BuiltEmulator, ModelOwner, largest_fitting
from scaleot_core.methods.covariances import covariances
from scaleot_core.models.families import feed_forward_name


def plan(owner: ModelOwner) -> Plan:
    """Plan the layers from α and β; with a `max_bytes_ratio`, from the fewest harmonizers that keep to it."""
    params, scores, shapes = owner.params, owner.scores(), owner.shapes
    if not params.max_bytes_ratio:
        return plan_for(params, scores, shapes)
    others = shapes.layers - params.adapter_layers

    def keeping(count: int) -> Plan:
        return plan_for(params, scores, shapes, replaced=others - count)

    least = 0 if params.adapter_layers else 1  # one decoder layer at least stays to be tuned
    return largest_fitting(owner, range(least, others + 1), keeping)


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build ScaleOT's emulator layer by layer."""
    params, layer_plan = owner.params, plan(owner)
    if not layers_of(layer_plan, "compressed"):
        say(f"alpha = {params.alpha} leaves no layer to compress, so beta = {params.beta} does nothing", "yellow")
    channels: dict[int, Tensor] = {}
    return BuiltEmulator(layer_plan, layer_by_layer(owner, layer_plan, channels), channels)


def layer_by_layer(owner: ModelOwner, plan: Plan, channels: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the emulator's tensors by their names, and put into `channels` those that each pruned layer keeps.

    Of the model's layers no more than one is in memory.
    """
    give_back_freed_memory()
    streamed, whiten, prunes = owner.stream(), owner.params.rank_compression.whiten, owner.params.channels.ratio > 0
    needs_covariances = layers_of(plan, "compressed") and (whiten or prunes)
    inputs = covariances(owner, streamed, channels=prunes) if needs_covariances else None

    yield from streamed.tensors(streamed.outside)
    for i, planned in enumerate(plan):
        if planned.harmonizer_rank is not None:
            harmonizer = Harmonizer(owner.config.hidden_size, planned.harmonizer_rank).to(owner.runtime.dtype)
            layer_importance.restore(harmonizer, owner.harmonizers / "harmonizers.safetensors", f"{i}.")
            yield from streamed.layer_tensors(i, harmonizer)
            continue
        with streamed.layer(i) as layer:
            if planned.kind == "compressed":
                by_name = inputs(i) if inputs else {}
                decompose = svd.cached_factors(owner.scratch, by_name if whiten else None)
                compress_layer(streamed.model, i, ranks=planned.ranks, decompose=decompose)
                if planned.channels is not None:
                    covariance = by_name[feed_forward_name(owner.config, i)]
                    channels[i] = prune_and_refit(streamed.model, i, planned.channels, covariance, owner.within.get(i))
            yield from streamed.layer_tensors(i, layer)
