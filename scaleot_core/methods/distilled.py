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

from scaleot_core.common import distributed
from scaleot_core.common.random import generator
from scaleot_core.compression import emulator
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.compression.plan import DECODER_KINDS, layers_of
from scaleot_core.compression.svd import svd_factors
from scaleot_core.methods import uniform
from scaleot_core.methods.base import BuiltEmulator, ModelOwner
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import hidden_of, hooks, last_hidden_state, next_token_loss, swapped_layers
from scaleot_core.training.blocks import BlockTrainer, draw_blocks, update

HIDDEN_WEIGHT = 30.0  # of the hidden states' error beside the cross-entropy, as in the source


@contextmanager
def _states_after(model: PreTrainedModel, index: int) -> Iterator[list[Tensor]]:
    """Collect the states (B, T, D) after a decoder layer, of each forward pass in the block."""
    states: list[Tensor] = []
    layer = decoder_layers(model)[index]
    with hooks(layer.register_forward_hook(lambda module, args, out: states.append(hidden_of(out)))):
        yield states


def loss(model: PreTrainedModel, blocks: Tensor, teacher: Tensor, square: Tensor, middle: int) -> Tensor:
    """Add to the cross-entropy (nats) 30 times the error of the states after a layer, over their mean square.

    blocks: (B, T); teacher: (B, T, D), the original's states after layer `middle`; square: their mean square, ().
    """
    with _states_after(model, middle) as states:
        entropy = next_token_loss(model, blocks)
    teacher, student = teacher.float(), states[0].float()
    return entropy + HIDDEN_WEIGHT * (teacher - student).square().mean() / square


class Distillation(BlockTrainer):
    """Trains a model's layers by the states that leave the last of the layers which they stand for.

    Several processes share a batch, of whose states there is one mean square.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        originals: dict[int, nn.Module],
        parameters: dict[str, nn.Parameter],
        owner: ModelOwner,
    ) -> None:
        self.model, self.originals, self.middle = model, originals, max(originals)
        super().__init__(
            parameters,
            owner.blocks,
            self._loss,
            owner.params.distill,
            seed=owner.params.seed,
            name="distill",
            label="distillation",
            checkpoint=owner.checkpoint,
        )

    def step(self, i: int) -> dict[str, float]:
        """Take step i: ask the original layers first, about this process's part of the batch; all take part."""
        batch = draw_blocks(self.blocks, self.settings.batch_blocks, generator(self.seed, self.name, i))
        mine = distributed.shard_batch(batch)
        with (
            torch.no_grad(),
            swapped_layers(self.model, self.originals),
            _states_after(self.model, self.middle) as states,
        ):
            last_hidden_state(self.model, mine if len(mine) else batch[:1])
        self.teacher = states[0]
        square = self.teacher.float().square().mean()
        self.square = square.new_tensor(distributed.all_reduce_sum(square.item() * len(mine)) / len(batch))
        return update(self.optimizer, batch, self.loss, self.settings, i)

    def _loss(self, blocks: Tensor) -> Tensor:
        return loss(self.model, blocks, self.teacher, self.square, self.middle)


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build the emulator, and train the middle layers that it keeps."""
    plan = uniform.plan(owner)
    model = owner.load()
    originals: dict[int, nn.Module] = {}
    layers = decoder_layers(model)
    for i, planned in enumerate(plan):
        if planned.kind != "adapter":
            originals[i] = layers[i]
            layers[i] = copy.deepcopy(layers[i])
    emulator.apply_plan(model, plan, svd_factors)
    distributed.shard_layers(
        [*originals.values(), *(layers[i] for kind in DECODER_KINDS for i in layers_of(plan, kind))]
    )
    Distillation(model, originals, emulator.layer_parameters(model, plan, "compressed"), owner).run()
    model.requires_grad_(False)
    tensors = ((name, distributed.full_tensor(tensor)) for name, tensor in package_tensors(model, plan))
    return BuiltEmulator(plan, tensors)
