"""Layer importance: every harmonizer fitted alone to its own layer, and what losing that layer costs (section 2).

The prior that Dynamic LayerReplace starts from, and the other estimators that stand beside it to compare.
"""

import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json
from scaleot_core.common.progress import progress
from scaleot_core.common.runtime import generator, keep_freed_memory
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression.harmonizer import Harmonizer, Harmonizers
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.models.forward import (
    StandIn,
    hidden_of,
    hidden_states,
    hooks,
    mean_loss,
    next_token_loss,
    swapped_layers,
)
from scaleot_core.settings import HarmonizerForm
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import run_steps
from scaleot_core.training.optimizer import Optimizer, linear_warmup_decay


def new_harmonizers(model: PreTrainedModel, form: HarmonizerForm, seed: int) -> Harmonizers:
    """Make one fresh float32 harmonizer per decoder layer, on the model's device."""
    draw = generator(seed, "harmonizers")
    harmonizers = Harmonizers()
    for _ in decoder_layers(model):
        harmonizer = Harmonizer(model.config.hidden_size, form, in_tuple=family(model.config).in_tuple)
        harmonizer.reset(draw)
        harmonizers.append(harmonizer)
    return harmonizers.to(model.device)


def read_scores(path: Path, layers: int) -> list[float]:
    """Read the scores of a model's decoder layers; UserError where one is missing or not finite."""
    scores = read_json(path).get("scores", [])
    if len(scores) != layers:
        raise UserError(f"{path}: {len(scores)} scores, and the model has {layers} decoder layers; make it again")
    for i, score in enumerate(scores):
        if type(score) not in (int, float) or not math.isfinite(score):
            raise UserError(f"{path}: layer {i} has score {score}; make it again")
    return scores


def restore(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Load fitted harmonizers, or with the prefix `3.` layer 3's alone, into a module of any dtype.

    UserError names the first tensor that another model or rank would have.
    """
    tensors = read_tensors(path, prefix)
    expected = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        here, there = expected.get(name), tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (there, here)]
            raise UserError(
                f"{path}: tensor {name!r} is {shapes[0]} there and {shapes[1]} in this model; "
                "these harmonizers are another model's or of another rank: run layer_importance again"
            )
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


class LocalFit:
    """Local regression of all harmonizers at once, as batched matrix products over the layers.

    A token's error counts relative to the mean square of the state it leaves the layer with, as the next layer's norm
    will see it; otherwise the few tokens with massive activations would decide alone. Inputs are standardised by
    feature with the same weighting, and targets scaled to size one, so that one learning rate serves every layer. Both
    are folded back into the weights.
    """

    def __init__(self, harmonizers: Harmonizers, states: list[Tensor]) -> None:
        self.states = states
        self.harmonizers = harmonizers
        means, deviations, weights, scales = [], [], [], []
        for before, after in pairwise(states):
            x, target = before.float(), after.float() - before.float()
            weight = 1 / after.float().square().mean(1)  # (N·T,)
            mean = (weight @ x) / weight.sum()
            means.append(mean)
            deviations.append(((weight @ (x - mean).square()) / weight.sum()).sqrt().clamp(min=1e-6))
            weights.append(weight)
            scales.append((weight @ target.square().mean(1) / len(weight)).sqrt())
        self.mean, self.deviation = torch.stack(means)[:, None], torch.stack(deviations)[:, None]  # (L, 1, D)
        self.scale = torch.stack(scales).clamp(min=1e-6)[:, None, None]  # (L, 1, 1)
        self.token_weights = torch.stack(weights)  # (L, N·T)
        stack = {
            "down": torch.stack([h.down.weight for h in harmonizers]),  # (L, r, D)
            "down_bias": torch.stack([h.down.bias for h in harmonizers])[:, None],  # (L, 1, r)
            "up": torch.stack([h.up.weight for h in harmonizers]),  # (L, D, r)
            "up_bias": torch.stack([h.up.bias for h in harmonizers])[:, None],  # (L, 1, D)
        }
        self.weights = {name: nn.Parameter(value.detach().clone()) for name, value in stack.items()}

    def loss(self, rows: Tensor) -> Tensor:
        """Compute the error relative to what each layer adds, summed over layers, at token positions `rows` (n,)."""
        states = torch.stack([state[rows] for state in self.states])  # (L + 1, n, D)
        before, after = states[:-1].float(), states[1:].float()
        x, target = (before - self.mean) / self.deviation, after - before
        hidden = torch.relu(torch.baddbmm(self.weights["down_bias"], x, self.weights["down"].mT))
        error = torch.baddbmm(self.weights["up_bias"], hidden, self.weights["up"].mT) - target / self.scale
        return (error.square().mean(2) * self.token_weights[:, rows]).mean(1).sum()

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the fitted weights, mean and scales folded in, into the harmonizers."""
        for i, harmonizer in enumerate(self.harmonizers):
            down = self.weights["down"][i] / self.deviation[i]
            harmonizer.down.weight.copy_(down)
            harmonizer.down.bias.copy_(self.weights["down_bias"][i, 0] - down @ self.mean[i, 0])
            harmonizer.up.weight.copy_(self.weights["up"][i] * self.scale[i])
            harmonizer.up.bias.copy_(self.weights["up_bias"][i, 0] * self.scale[i, 0])


def fit_locally(
    model: PreTrainedModel,
    harmonizers: Harmonizers,
    blocks: Tensor,
    *,
    steps: int,
    batch_tokens: int,
    lr: float,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Fit each harmonizer to its own layer on the hidden states of `blocks` (N, T), kept from one forward pass.

    Memory: (L + 1) · N · T · D numbers in the model's dtype. Returns the loss a step: the mean over layers of the
    squared error relative to what the layer adds.
    """
    keep_freed_memory()
    states = hidden_states(model, blocks)
    fit = LocalFit(harmonizers, states)
    optimizer = Optimizer(fit.weights)
    tokens = states[0].shape[0]
    batch = min(batch_tokens, tokens)

    def step(i: int) -> dict[str, float]:
        rows = torch.randint(tokens, (batch,), generator=generator(seed, "local fit", i))
        loss = fit.loss(rows.to(model.device))
        loss.backward()
        optimizer.step(lr * linear_warmup_decay(i, steps, 0.05))
        return {"loss": loss.item() / len(harmonizers), "tokens": batch}

    history = run_steps(step, optimizer, label="local fits", steps=steps, checkpoint=checkpoint)
    fit.write_back()
    return history


class Restart(StandIn):
    """Stands where a layer was: drops what comes and gives hidden states that are known from before."""

    def __init__(self, states: Tensor, *, in_tuple: bool = False) -> None:
        super().__init__(in_tuple=in_tuple)
        self.states = states

    def replacement(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.states


class Skip(StandIn):
    """Stands where a layer was that needn't run."""

    def replacement(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return hidden_states


@torch.no_grad()
def sensitivity(model: PreTrainedModel, harmonizers: Harmonizers, blocks: Tensor, batch_blocks: int = 8) -> list[float]:
    """Measure the loss (nats) that replacing one layer alone by its harmonizer costs, for every layer, on `blocks`.

    The layers before it run once for all: what comes of layer i's harmonizer on its known input is put in its place.
    """
    whole, in_tuple = mean_loss(model, blocks, batch_blocks), family(model.config).in_tuple
    costs = [0.0] * len(harmonizers)
    with progress("sensitivity", len(harmonizers) * math.ceil(len(blocks) / batch_blocks)) as tick:
        for batch in blocks.split(batch_blocks):
            inputs = hidden_states(model, batch, batch_blocks)
            for i, harmonizer in enumerate(harmonizers):
                replaced = harmonizer.replacement(inputs[i].unflatten(0, batch.shape))
                skipped: dict[int, nn.Module] = dict.fromkeys(range(i), Skip(in_tuple=in_tuple))
                with swapped_layers(model, {**skipped, i: Restart(replaced, in_tuple=in_tuple)}):
                    loss = mean_loss(model, batch, batch_blocks)
                costs[i] += (loss - whole) * len(batch) / len(blocks)
                tick(tokens=batch.numel(), loss=loss - whole)
    return costs


@torch.no_grad()
def block_influence(model: PreTrainedModel, blocks: Tensor) -> list[float]:
    """Average 1 − cosine of a layer's input and output over tokens (ShortGPT, Men et al. 2024, equation 1)."""
    states = hidden_states(model, blocks)
    pairs = pairwise(states)
    return [1 - nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).mean().item() for a, b in pairs]


def taylor(model: PreTrainedModel, blocks: Tensor) -> list[float]:
    """Estimate to first order what dropping a layer costs: |⟨∂ℓ/∂x_out, x_out − x_in⟩|, summed over tokens.

    Gradients are taken of the hidden states alone; the model's weights stay frozen.
    """
    layers = decoder_layers(model)
    totals = [0.0] * len(layers)
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        state = hidden_of(out)
        state.retain_grad()
        states.append(state)

    def start(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first = args[0].detach().requires_grad_()
        states.append(first)
        return (first, *args[1:])

    handles = [layers[0].register_forward_pre_hook(start), *(layer.register_forward_hook(keep) for layer in layers)]
    with hooks(*handles):
        for block in blocks.split(1):
            states.clear()
            next_token_loss(model, block).backward()
            for i, (before, after) in enumerate(pairwise(states)):
                assert after.grad is not None
                totals[i] += (after.grad.float() * (after - before).float()).sum().abs().item() / len(blocks)
    return totals


def estimate(name: str, model: PreTrainedModel, harmonizers: Harmonizers, blocks: Tensor) -> list[float]:
    """Estimate every layer's cost by the named estimator, one of `layer_importance.estimator`."""
    if name == "sensitivity":
        return sensitivity(model, harmonizers, blocks)
    if name == "block_influence":
        return block_influence(model, blocks)
    return taylor(model, blocks)


def prior_scores(costs: list[float]) -> list[float]:
    """Turn an estimator's costs into scores: their logarithms, standardised to mean 0 and standard deviation 2.

    Costs span orders of magnitude, and s_i is a log-odds (p_i = sigmoid(s_i)), so the logarithm is its natural
    scale; the spread lets p reach from about 0.02 to 0.98. A cost at or below zero counts as the least positive one.
    """
    values = torch.tensor(costs, dtype=torch.float64)
    positive = values[values > 0]
    if len(positive) == 0:
        return [0.0] * len(costs)
    logs = values.clamp(min=positive.min()).log()
    if bool((logs == logs[0]).all()):
        return [0.0] * len(costs)
    return ((logs - logs.mean()) / logs.std() * 2).tolist()
