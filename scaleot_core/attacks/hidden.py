"""What the package hides of the model: its parameters that stand for it, and how much hangs on it.

*Recovery difficulty* is the model's loss with what is hidden drawn anew, SCARA's predictor of how hard a model is to
win back (Huang et al. 2024, arXiv 2410.11182). There whole layers are hidden; here also ranks and channels.
"""

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.attacks.restoration import draw_layer, fresh_matrix
from scaleot_core.compression.channels import channel_rows, channels_of
from scaleot_core.compression.low_rank import FusedProjection, LowRankLinear, weight_of
from scaleot_core.compression.plan import LayerKind, Plan, layers_of
from scaleot_core.models.families import attention, decoder_layers, family, feed_forward_paths, fusion
from scaleot_core.models.forward import mean_loss

HIDDEN_LAYERS: tuple[LayerKind, ...] = ("harmonizer", "shared", "removed")  # of which the package has nothing
DRAWS = 3  # of what is hidden, for the mean and its deviation


class CutMatrix(NamedTuple):
    """One matrix of an attention projection that the package has at a lower rank, or beside such a one."""

    projection: str
    """Its projection's name in the attention."""
    part: int
    """Its number among those that are fused in the projection."""
    rank: int
    rows: Tensor
    """Which of the projection's outputs are its own."""
    module: nn.Module
    """The package's module for it."""

    @property
    def shipped(self) -> Tensor:
        """The matrix (out, in) that the package has for it."""
        module = self.module
        return module.left @ module.right if isinstance(module, LowRankLinear) else weight_of(module)[0]


def cut_matrices(model: PreTrainedModel, emulator: PreTrainedModel, plan: Plan, index: int) -> Iterator[CutMatrix]:
    """Yield the matrices of one compressed layer's cut attention projections; the model needs no weights."""
    real_block, block = (attention(m.config, decoder_layers(m)[index]) for m in (model, emulator))
    for name, ranks in plan[index].ranks.items():
        rows = fusion(model.config, name).rows(len(weight_of(real_block.get_submodule(name))[0]))
        module = block.get_submodule(name)
        parts = list(module.parts) if isinstance(module, FusedProjection) else [module]
        for k, (rank, outputs, part) in enumerate(zip(ranks, rows, parts, strict=True)):
            yield CutMatrix(name, k, rank, outputs, part)


def cut_parameters(model: PreTrainedModel, emulator: PreTrainedModel, plan: Plan) -> dict[str, nn.Parameter]:
    """Collect the emulator's parameters that stand for what was cut, by name; the model needs no weights.

    Those of harmonizers and shared layers, the attention's matrices at a lower rank, and the feed-forward matrices with
    fewer channels. Removed layers have none.
    """
    names = family(model.config)
    prefixes = tuple(f"{names.layers}.{i}." for i in layers_of(plan, *HIDDEN_LAYERS))
    matrices = list[str]()
    for i in layers_of(plan, "compressed"):
        inside = {f"{names.attention}.{cut.projection}" for cut in cut_matrices(model, emulator, plan, i)}
        if channels_of(emulator, i) < channels_of(model, i):
            inside |= {*feed_forward_paths(model.config)}
        matrices += [f"{names.layers}.{i}.{inner}." for inner in sorted(inside)]
    return {
        name: parameter
        for name, parameter in emulator.named_parameters()
        if name.startswith(prefixes) or (parameter.ndim > 1 and name.startswith(tuple(matrices)))
    }


def _complement(shipped: Tensor, rank: int, drawn: Tensor) -> Tensor:
    """Take out of a drawn matrix (out, in) what lies in the leading subspaces of the shipped one, on either side."""
    left, _, right = torch.linalg.svd(shipped.float(), full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    drawn = drawn.to(shipped.device)
    drawn = drawn - left @ (left.T @ drawn)
    return drawn - (drawn @ right.T) @ right


@torch.no_grad()
def draw_hidden(
    model: PreTrainedModel, emulator: PreTrainedModel, plan: Plan, channels: Mapping[int, Tensor], seed: int
) -> None:
    """Draw anew, in the real model and in place, what the package hides of it, as a fresh model's weights are drawn.

    Whole layers; of a matrix at a lower rank what lies outside the subspaces that the package has; of a pruned
    feed-forward part the channels that are not among the layer's `channels`.
    """
    names = family(model.config)
    for i, planned in enumerate(plan):
        layer, draw = decoder_layers(model)[i], partial(fresh_matrix, model, seed, "hidden", i)
        if planned.kind in HIDDEN_LAYERS:
            draw_layer(layer, draw)
        if planned.kind != "compressed":
            continue
        for cut in cut_matrices(model, emulator, plan, i):
            weight, _ = weight_of(attention(model.config, layer).get_submodule(cut.projection))
            shipped = cut.shipped.to(weight.device)
            drawn = _complement(shipped, cut.rank, draw(f"{cut.projection}.{cut.part}", shipped.shape))
            weight[cut.rows.to(weight.device)] = (shipped.float() + drawn).to(weight.dtype)
        if i in channels:
            count = channels_of(model, i)
            cut_channels = torch.tensor(sorted({*range(count)} - {*channels[i].tolist()}), dtype=torch.long)
            for inner, fused in names.feed_forward_in.items():
                weight, bias = weight_of(layer.get_submodule(inner))
                rows = channel_rows(cut_channels, count, fused).to(weight.device)
                weight[rows] = draw(inner, (len(rows), weight.shape[1])).to(weight)
                if bias is not None:
                    bias[rows] = 0
            weight, _ = weight_of(layer.get_submodule(names.feed_forward_out))
            weight[:, cut_channels.to(weight.device)] = draw(
                names.feed_forward_out, (len(weight), len(cut_channels))
            ).to(weight)


def recovery_difficulty(
    model: PreTrainedModel,
    emulator: PreTrainedModel,
    plan: Plan,
    channels: Mapping[int, Tensor],
    heldout: Tensor,
    seed: int,
) -> dict[str, float]:
    """Measure the recovery difficulty (nats a token) on held-out blocks (N, T), and its deviation over `DRAWS` draws.

    The real model is left with what was drawn last.
    """
    losses = []
    for k in range(DRAWS):
        draw_hidden(model, emulator, plan, channels, seed + k)
        losses.append(mean_loss(model, heldout))
    return {"loss": statistics.fmean(losses), "loss_stdev": statistics.stdev(losses)}
