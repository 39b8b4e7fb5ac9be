"""The restoration attack: whoever has the package and public text trains it to win the model back.

What is trained and by which loss tells attackers apart (`targets`): everything, or only what was cut; by the text
itself, or by the outputs of the model where it is served (`imitation_loss`). The attacker may also build on the package
first (`widen`): every harmonizer gets a whole layer behind it, and every matrix that was cut its full rank back. The
floor is the same shapes without the package's weights (`forget`).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common import distributed
from scaleot_core.common.files import cached_json
from scaleot_core.common.random import generator
from scaleot_core.compression.emulator import number_attention
from scaleot_core.compression.harmonizer import Harmonizer
from scaleot_core.compression.low_rank import FusedProjection, LowRankLinear, dense
from scaleot_core.compression.plan import DECODER_KINDS, Plan, layers_of
from scaleot_core.models.families import attention, decoder_layers, family
from scaleot_core.models.forward import Removed, hidden_of, mean_loss, next_token_loss
from scaleot_core.settings import Attack
from scaleot_core.training.blocks import BlockTrainer
from scaleot_core.training.checkpoint import Checkpoint


class Widened(nn.Module):
    """A harmonizer with a whole decoder layer behind it."""

    def __init__(self, harmonizer: Harmonizer, layer: nn.Module) -> None:
        super().__init__()
        self.harmonizer = harmonizer
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        output: Tensor = self.layer(hidden_of(self.harmonizer(hidden_states)), *args, **kwargs)
        return output


@torch.no_grad()
def widen(model: PreTrainedModel, plan: Plan) -> None:
    """Restore the emulator's full capacity, in place: a layer behind every harmonizer, full rank.

    A new layer is a copy of the nearest decoder layer, with zeros in its output matrices: nothing changes at the
    start, where norms come before, as in all but OPT-350m.
    """
    layers, names = decoder_layers(model), family(model.config)
    decoder = layers_of(plan, *DECODER_KINDS)
    for i in layers_of(plan, "compressed"):
        block = attention(model.config, layers[i])
        for name in names.projections:
            module = block.get_submodule(name)
            if isinstance(module, LowRankLinear):
                setattr(block, name, dense(module))
            elif isinstance(module, FusedProjection):
                module.parts = nn.ModuleList(dense(p) if isinstance(p, LowRankLinear) else p for p in module.parts)
    for i in layers_of(plan, "harmonizer"):
        layer = copy.deepcopy(layers[min(decoder, key=lambda k: abs(k - i))])
        for written in (f"{names.attention}.{list(names.projections)[-1]}", names.feed_forward_out):
            for parameter in layer.get_submodule(written).parameters():
                parameter.zero_()
        layers[i] = Widened(layers[i], layer)  # type: ignore[arg-type]
    number_layers(model)


def number_layers(model: PreTrainedModel) -> None:
    """Number the layers that have attention anew, those behind harmonizers too."""
    layers = decoder_layers(model)
    inner = {i: layer.layer if isinstance(layer, Widened) else layer for i, layer in enumerate(layers)}
    number_attention(model, {i: layer for i, layer in inner.items() if not isinstance(layer, Removed)})


@torch.no_grad()
def forget(model: PreTrainedModel, plan: Plan, seed: int) -> None:
    """Draw the weights of all but the adapter layers anew, in place, as a fresh model's; embeddings and head stay."""
    for i, layer in enumerate(plan):
        if layer.kind != "adapter":
            draw_layer(decoder_layers(model)[i], partial(fresh_matrix, model, seed, "forget", i))


@torch.no_grad()
def draw_layer(layer: nn.Module, draw: Callable[[str, Sequence[int]], Tensor]) -> None:
    """Draw a layer's matrices anew, in place, by name and shape; biases become 0, norms 1."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(draw(name, parameter.shape))
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)


def fresh_matrix(model: PreTrainedModel, seed: int, label: str, layer: int, name: str, shape: Sequence[int]) -> Tensor:
    """Draw a matrix, float32 on the CPU, as a fresh model of this configuration has it."""
    deviation = getattr(model.config, "initializer_range", 0.02)
    return torch.empty(*shape).normal_(0, deviation, generator=generator(seed, label, layer, name))


def imitation_loss(model: PreTrainedModel, served: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Compute the mean cross-entropy (nats) to another model's next-token distributions on blocks (B, T).

    Distillation (Hinton et al. 2015). In its mean over samples this is also the loss of an attacker who is given one
    sampled token at each place, so the distribution is the most that a query reveals.
    """
    blocks = blocks.to(model.device).long()
    with torch.no_grad():
        teacher = served(input_ids=blocks, use_cache=False).logits[:, :-1].float().softmax(-1)
    logits = model(input_ids=blocks, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), teacher.flatten(0, 1))


def restore(
    model: PreTrainedModel,
    blocks: Tensor,
    heldout: Tensor,
    attack: Attack,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter] | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Train `parameters` in place on blocks (N, T) by `loss`; return the held-out cross-entropy by tokens seen.

    The defaults are every weight and the blocks' next-token loss. `attack.eval_points` measurements lie at even
    distances behind that of the start.
    """
    trainer = BlockTrainer(
        dict(model.named_parameters()) if parameters is None else parameters,
        blocks,
        partial(next_token_loss, model) if loss is None else loss,
        attack,
        seed=seed,
        name="attack",
        label=label,
        checkpoint=checkpoint,
    )
    checkpoint.resume(trainer.optimizer)  # also where nothing is left to train
    curve = []
    for point in range(attack.eval_points + 1):
        end = round(attack.steps * point / attack.eval_points)
        file = checkpoint.folder / f"loss-{end}.json"
        if end and not file.exists():
            trainer.run(until=end)
            checkpoint.save(trainer.optimizer, end)
        measure = partial(cached_json, file, partial(mean_loss, model, heldout))
        measured = distributed.broadcast_from_main(measure)
        curve.append({"tokens": end * attack.batch_blocks * blocks.shape[1], "loss": measured})
    model.requires_grad_(False)
    return curve


def curves(losses: Mapping[str, Sequence[Mapping[str, float]]], model_loss: float) -> list[dict[str, Any]]:
    """List all targets' curves: perplexity, and the share of the gap in log-perplexity that is closed.

    The gap is between the first target's first loss and `model_loss` (nats); without one the share is None.
    """
    start = next(iter(losses.values()))[0]["loss"]
    return [
        {
            "target": name,
            "tokens": point["tokens"],
            "perplexity": math.exp(point["loss"]),
            "recovered": (start - point["loss"]) / (start - model_loss) if start != model_loss else None,
        }
        for name, curve in losses.items()
        for point in curve
    ]
