"""Offsite-tuning: the layers that `uniform` keeps, distilled from all of them on the corpus.

Source: Xiao et al. 2023 (arXiv 2302.04870), as in github.com/mit-han-lab/offsite-tuning: the kept middle layers start
as copies and are trained alone, by next-token cross-entropy + 30 · mean(((t − s) / rms(t))²) of the hidden states that
leave the last middle layer, with one rms a batch. Its number of steps is not stated there; here it is `distill.steps`,
with our schedule instead of its cosine.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core import emulator, parallel
from scaleot_core.decomposition import plain
from scaleot_core.families import decoder_layers
from scaleot_core.methods import uniform
from scaleot_core.methods.budget import Made, Owner
from scaleot_core.models import hooked, replaced, run_stack
from scaleot_core.package import tensors_of
from scaleot_core.runtime import generator, keep_freed_memory
from scaleot_core.training import Optimizer, run_steps, warmup_then_linear


def _forward(model: PreTrainedModel, blocks: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """Last hidden states, and those that leave decoder layer `middle`, both (B, T, D)."""
    left: list[Tensor] = []
    layer = decoder_layers(model)[middle]
    with hooked(layer.register_forward_hook(lambda module, args, out: left.append(out))):
        last = run_stack(model, blocks)
    return last, left[0]


def loss(model: PreTrainedModel, blocks: Tensor, teacher: Tensor, middle: int, weight: float) -> Tensor:
    """Cross-entropy (nats) + weight · the normalised error against the teacher's states (B, T, D) after a layer."""
    last, student = _forward(model, blocks, middle)
    logits = model.get_output_embeddings()(last[:, :-1]).float()
    targets = blocks[:, 1:].to(model.device).long()
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    teacher = teacher.float()
    return entropy + weight * (teacher - student.float()).square().mean() / teacher.square().mean()


def make(owner: Owner) -> Made:
    """The emulator, with what is left of its middle trained."""
    kept, distill, seed = uniform.plan(owner), owner.params.distill, owner.params.seed
    model = owner.load()
    originals: dict[int, nn.Module] = {}
    layers = decoder_layers(model)
    for i, kind in enumerate(kept.kinds):
        if kind != "adapter":
            originals[i] = layers[i]
            layers[i] = copy.deepcopy(layers[i])
    emulator.stand_in(model, kept, plain)
    keep_freed_memory()
    trained = emulator.layer_parameters(model, kept, "compressed")
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = Optimizer(trained)
    middle = max(originals)

    def step(i: int) -> dict[str, Any]:
        at = torch.randint(len(owner.blocks), (distill.batch_blocks,), generator=generator(seed, "distill", i))

        def of(part: Tensor) -> Tensor:
            with torch.no_grad(), replaced(model, originals):
                teacher = _forward(model, part, middle)[1]
            return loss(model, part, teacher, middle, distill.hidden_weight)

        value = parallel.backward(owner.blocks[at], of)
        optimizer.step(distill.lr * warmup_then_linear(i, distill.steps, 0.1))
        return {"loss": value, "tokens": at.numel() * owner.blocks.shape[1]}

    run_steps(step, optimizer, label="distillation", steps=distill.steps, checkpoint=owner.checkpoint)
    model.requires_grad_(False)
    return Made(kept, tensors_of(model, kept))
