"""ScaleOT: harmonizers for the layers of least importance, Selective Rank Compression of the others (method 1 to 4)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from scaleot_core.common.allocator import give_back_freed_memory
from scaleot_core.common.files import fingerprint
from scaleot_core.common.progress import say
from scaleot_core.common.tensors import read_tensors, tensor_hash, write_tensors
from scaleot_core.compression import dlr, emulator, layer_importance, svd
from scaleot_core.compression.channels import prune_channels, select_channels
from scaleot_core.compression.emulator import assemble, package_tensors
from scaleot_core.compression.harmonizer import Harmonizer
from scaleot_core.compression.low_rank import weight_of
from scaleot_core.compression.plan import Plan, plan_for
from scaleot_core.compression.rank_compression import compress_layer
from scaleot_core.methods.base import BuiltEmulator, ModelOwner, largest_fitting
from scaleot_core.models.families import family, feed_forward_name
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.params import changed


def plan(owner: ModelOwner) -> Plan:
    """Plan the layers from α and β; with a `max_bytes_ratio`, from the smallest α that keeps to it."""
    params, scores, model = owner.params, owner.scores(), owner.outline
    if not params.max_bytes_ratio:
        return plan_for(params, scores, model)
    others = len(scores) - params.adapter_layers

    def keeping(kept: int) -> Plan:
        return plan_for(changed(params, {"alpha": (others - kept) / others}), scores, model)

    return keeping(largest_fitting(owner, range(0, others + 1), keeping))


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build ScaleOT's emulator layer by layer. With `after_src.steps` its harmonizers are trained once more in it."""
    params, decided = owner.params, plan(owner)
    if not decided.layers("compressed"):
        say(f"alpha = {params.alpha} leaves no layer to compress, so beta = {params.beta} does nothing", "yellow")
    channels: dict[int, Tensor] = {}
    tensors = layer_by_layer(owner, decided, channels)
    if params.after_src.steps and decided.layers("harmonizer"):
        model = assemble(owner.config, decided, tensors, device=owner.runtime.device)
        owner.count(model)
        trained = emulator.layer_parameters(model, decided, "harmonizer")
        dlr.finetune_after_src(
            model, trained, owner.blocks, params.after_src, seed=params.seed, checkpoint=owner.checkpoint
        )
        tensors = package_tensors(model, decided)
    return BuiltEmulator(decided, tensors, channels)


def layer_by_layer(owner: ModelOwner, decided: Plan, channels: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the emulator's tensors by their names, and put into `channels` those that each pruned layer keeps.

    Of the model's layers no more than one is in memory.
    """
    give_back_freed_memory()
    streamed = owner.stream()
    model, scratch = streamed.model, owner.scratch
    whiten, compressed = owner.params.rank_compression.whiten, decided.layers("compressed")
    inputs = covariances(owner, streamed) if compressed and (whiten or decided.cuts) else None

    yield from streamed.tensors(streamed.outside)
    for i, kind in enumerate(decided.kinds):
        if kind == "harmonizer":
            harmonizer = Harmonizer(owner.config.hidden_size, decided.harmonizer).to(owner.runtime.dtype)
            layer_importance.restore(harmonizer, owner.harmonizers / "harmonizers.safetensors", f"{i}.")
            yield from streamed.layer_tensors(i, harmonizer)
            continue
        with streamed.layer(i) as layer:
            if kind == "compressed":
                known = inputs(i) if inputs else {}
                decompose = svd.cached_factors(scratch, known if whiten else None)
                compress_layer(model, i, ranks=decided.ranks(model, i), decompose=decompose)
                if cut := decided.cuts.get(i):
                    weight, _ = weight_of(layer.get_submodule(family(owner.config).feed_forward_out))
                    covariance = known[feed_forward_name(owner.config, i)].to(weight.device)
                    channels[i], refitted = select_channels(weight, covariance, cut.channels)
                    prune_channels(model, i, channels[i], refitted)
            yield from streamed.layer_tensors(i, layer)


def covariances(owner: ModelOwner, streamed: StreamedModel) -> Callable[[int], dict[str, Tensor]]:
    """Compute each layer's input covariances on the corpus, by the names of its projections.

    With `channel_pruning.ratio` those of the down-projection too. Computed once for a model and its calibration blocks,
    and cached in one file per layer; a covariance that several projections share is stored once, under all their names.

    """
    blocks, channels = (
        owner.blocks[: owner.params.rank_compression.calibration_blocks],
        owner.params.channel_pruning.ratio > 0,
    )
    key = fingerprint(owner.folder, owner.runtime.device.type, str(owner.runtime.dtype), tensor_hash(blocks), channels)

    def file(i: int) -> Path:
        return owner.scratch / f"inputs-{key}" / f"{i}.safetensors"

    @contextmanager
    def around(i: int, layer: nn.Module) -> Iterator[None]:
        with svd.input_covariances(streamed.model.config, i, layer, channels=channels) as sums:
            yield
        shared: dict[int, list[str]] = {}
        for name, total in sums.items():
            shared.setdefault(id(total), []).append(name)
        means = {",".join(names): (sums[names[0]] / blocks.numel()).float() for names in shared.values()}
        write_tensors(file(i), means)

    if not all(file(i).exists() for i in range(streamed.model.config.num_hidden_layers)):
        streamed.run(blocks, around)
    return lambda i: {name: mean for names, mean in read_tensors(file(i)).items() for name in names.split(",")}
