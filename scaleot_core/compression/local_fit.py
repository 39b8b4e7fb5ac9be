"""Local fits: every harmonizer fitted alone to its own layer (method section 2)."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common.runtime import generator, keep_freed_memory
from scaleot_core.compression.harmonizer import Harmonizers
from scaleot_core.models.forward import hidden_states
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import run_steps
from scaleot_core.training.optimizer import Optimizer, linear_warmup_decay

SOLVED_TOKENS = 16384  # on which the output weights are solved for
RIDGE = 1e-5  # of the Gram matrix's mean diagonal, for units that never fire


class LocalFit:
    """Local regression of all harmonizers at once, as batched matrix products over the layers.

    A token's error counts relative to the mean square of the state it leaves the layer with, as the next layer's norm
    will see it; otherwise the few tokens with massive activations would decide alone. Inputs are standardised by
    feature with the same weighting, and targets scaled to size one, so that one learning rate serves every layer. Both
    are folded back into the weights. Gradient steps train the hidden units; the output weights are then solved for by
    least squares.
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
    def solve_outputs(self, rows: Tensor) -> None:
        """Set W_up and b_up to the least error at token positions `rows` (n,), given the hidden units."""
        for i, (before, after) in enumerate(pairwise(self.states)):
            x = before[rows].float()
            target = (after[rows].float() - x) / self.scale[i]
            x = (x - self.mean[i]) / self.deviation[i]
            hidden = torch.relu(torch.addmm(self.weights["down_bias"][i], x, self.weights["down"][i].T))
            hidden = nn.functional.pad(hidden, (0, 1), value=1.0).double()  # (n, r + 1), the last for the bias
            weighted = hidden.T * self.token_weights[i, rows]
            gram = weighted @ hidden
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            solution = torch.linalg.solve(gram, weighted @ target.double())  # (r + 1, D)
            self.weights["up"][i].copy_(solution[:-1].T)
            self.weights["up_bias"][i].copy_(solution[-1:])

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
    if steps:
        rows = torch.randperm(tokens, generator=generator(seed, "local fit, outputs"))[:SOLVED_TOKENS]
        fit.solve_outputs(rows.to(model.device))
    fit.write_back()
    return history
