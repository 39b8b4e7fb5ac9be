"""Offsite-tuning: the layers that `uniform` keeps, distilled from all of them on the corpus.

Source: Xiao et al. 2023 (arXiv 2302.04870), as in github.com/mit-han-lab/offsite-tuning: the kept middle layers start
as copies and are trained alone, by next-token cross-entropy + 30 · mean(((t − s) / rms(t))²) of the hidden states that
leave the last middle layer, with one rms a batch. Its number of steps is not stated there; here it is `distill.steps`,
with our schedule instead of its cosine.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.compression import emulator
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.compression.svd import svd_factors
from scaleot_core.memory import Weights, check_weights
from scaleot_core.methods import uniform
from scaleot_core.methods.base import BuiltEmulator, ModelOwner
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import hidden_of, hooks, last_hidden_state, next_token_loss, swapped_layers
from scaleot_core.training.blocks import BlockTrainer


@contextmanager
def _states_after(model: PreTrainedModel, index: int) -> Iterator[list[Tensor]]:
    """Collect the states (B, T, D) after a decoder layer, of each forward pass in the block."""
    left: list[Tensor] = []
    layer = decoder_layers(model)[index]
    with hooks(layer.register_forward_hook(lambda module, args, out: left.append(hidden_of(out)))):
        yield left


def loss(model: PreTrainedModel, blocks: Tensor, teacher: Tensor, middle: int, weight: float) -> Tensor:
    """Add to the cross-entropy (nats) weight · the normalised error of states (B, T, D) after a layer."""
    with _states_after(model, middle) as left:
        entropy = next_token_loss(model, blocks)
    teacher, student = teacher.float(), left[0].float()
    return entropy + weight * (teacher - student).square().mean() / teacher.square().mean()


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build the emulator, and train the middle layers that it keeps; UserError where there is no room for that."""
    kept, distill, seed = uniform.plan(owner), owner.params.distill, owner.params.seed
    copied = sum(p.numel() for p in emulator.layer_parameters(owner.outline, kept, "compressed").values())
    weights = Weights(owner.outline.num_parameters() + copied, trained=copied)
    check_weights("compress, method distilled", weights, owner.runtime)
    model = owner.load()
    originals: dict[int, nn.Module] = {}
    layers = decoder_layers(model)
    for i, kind in enumerate(kept.kinds):
        if kind != "adapter":
            originals[i] = layers[i]
            layers[i] = copy.deepcopy(layers[i])
    emulator.apply_plan(model, kept, svd_factors)
    middle = max(originals)

    def of(blocks: Tensor) -> Tensor:
        with torch.no_grad(), swapped_layers(model, originals), _states_after(model, middle) as left:
            last_hidden_state(model, blocks)
        return loss(model, blocks, left[0], middle, distill.hidden_weight)

    trained = emulator.layer_parameters(model, kept, "compressed")
    BlockTrainer(
        trained,
        owner.blocks,
        of,
        distill,
        seed=seed,
        name="distill",
        label="distillation",
        checkpoint=owner.checkpoint,
    ).run()
    model.requires_grad_(False)
    return BuiltEmulator(kept, package_tensors(model, kept))
