"""Local fits: every harmonizer fitted alone to its own layer (method section 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from scaleot_core.common.allocator import keep_freed_memory
from scaleot_core.common.random import generator
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.harmonizer import Harmonizer, Harmonizers
from scaleot_core.models.forward import hidden_of, hooks
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import run_steps
from scaleot_core.training.optimizer import Optimizer, linear_warmup_decay

BATCH_TOKENS = 1024  # in a step of local regression


class LocalFit:
    """Fit one harmonizer to its layer's map from inputs to outputs (N, D).

    A token's error counts relative to the mean square of the state it leaves the layer with, as the next layer's norm
    will see it; otherwise the few tokens with massive activations would decide alone. Inputs are standardised by
    feature with the same weighting, and targets scaled to size one, so that one learning rate serves every layer. Both
    are folded back into the weights.
    """

    def __init__(self, harmonizer: Harmonizer, before: Tensor, after: Tensor) -> None:
        self.harmonizer, self.before, self.after = harmonizer, before, after
        x, target = before.float(), after.float() - before.float()
        squares = after.float().square().mean(1)
        self.token_weights = torch.where(squares > 0, 1 / squares, 0)  # (N,)
        total = self.token_weights.sum()
        self.mean = (self.token_weights @ x) / total  # (D,)
        self.deviation = ((self.token_weights @ (x - self.mean).square()) / total).sqrt().clamp(min=1e-6)  # (D,)
        scale = (self.token_weights @ target.square().mean(1) / len(x)).sqrt()
        self.scale = scale.clamp(min=1e-6)
        self.weights = {name: nn.Parameter(p.detach().clone()) for name, p in harmonizer.named_parameters()}

    def loss(self, rows: Tensor) -> Tensor:
        """Compute the error relative to what the layer adds, at token positions `rows` (n,)."""
        before, after = self.before[rows].float(), self.after[rows].float()
        x, target = (before - self.mean) / self.deviation, after - before
        hidden = torch.relu(nn.functional.linear(x, self.weights["down.weight"], self.weights["down.bias"]))
        added = nn.functional.linear(hidden, self.weights["up.weight"], self.weights["up.bias"])
        return ((added - target / self.scale).square().mean(1) * self.token_weights[rows]).mean()

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the fitted weights, mean and scales folded in, into the harmonizer."""
        down = self.weights["down.weight"] / self.deviation
        self.harmonizer.down.weight.copy_(down)
        self.harmonizer.down.bias.copy_(self.weights["down.bias"] - down @ self.mean)
        self.harmonizer.up.weight.copy_(self.weights["up.weight"] * self.scale)
        self.harmonizer.up.bias.copy_(self.weights["up.bias"] * self.scale)


def _joined(parts: list[Tensor]) -> Tensor:
    """Put tensors together, and drop them."""
    joined = torch.cat(parts)
    parts.clear()
    return joined


def fit_file(checkpoint: Checkpoint, i: int) -> Path:
    """Name the file of layer i's finished fit."""
    return checkpoint.folder / "fits" / f"{i}.safetensors"


def fit_locally(
    streamed: StreamedModel,
    harmonizers: Harmonizers,
    blocks: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Fit each harmonizer to its own layer on the hidden states of `blocks` (M, T), in one pass through the model.

    A layer's harmonizer is fitted when the blocks have passed it, and kept in the checkpoint's folder then. Memory: the
    embeddings, a layer, and its hidden states, 2 · M · T · D numbers in the model's dtype and 4 in float32. Returns the
    loss a step: the mean over layers of the squared error relative to what the layer adds.
    """
    keep_freed_memory()
    tokens = blocks.numel()
    rows = [
        torch.randint(tokens, (min(BATCH_TOKENS, tokens),), generator=generator(seed, "local fit", i))
        for i in range(steps)
    ]
    by_layer, losses = list(harmonizers), list[list[float]]()

    def fit(i: int, before: Tensor, after: Tensor) -> None:
        regression = LocalFit(by_layer[i], before, after)
        optimizer = Optimizer(regression.weights)

        def step(k: int) -> dict[str, float]:
            with torch.enable_grad():
                loss = regression.loss(rows[k].to(before.device))
                loss.backward()
            optimizer.step(lr * linear_warmup_decay(k, steps, 0.05))
            return {"loss": loss.item(), "tokens": len(rows[k])}

        label, inner = f"local fit {i + 1} of {len(by_layer)}", checkpoint and checkpoint.within(f"fits/{i}")
        history = run_steps(step, optimizer, label=label, steps=steps, checkpoint=inner)
        losses.append([row["loss"] for row in history])
        regression.write_back()
        if checkpoint and inner:
            write_tensors(fit_file(checkpoint, i), {**by_layer[i].state_dict(), "losses": torch.tensor(losses[-1])})
            inner.remove()

    @contextmanager
    def around(i: int, layer: nn.Module) -> Iterator[None]:
        """Keep what comes into a layer and what goes out; then fit, unless that was done before."""
        if checkpoint and fit_file(checkpoint, i).exists():
            yield
            fitted = read_tensors(fit_file(checkpoint, i))
            losses.append(fitted.pop("losses").tolist())
            by_layer[i].load_state_dict(fitted)
            return
        before: list[Tensor] = []
        after: list[Tensor] = []
        with hooks(
            layer.register_forward_pre_hook(lambda module, args: before.append(args[0].flatten(0, 1))),
            layer.register_forward_hook(lambda module, args, out: after.append(hidden_of(out).flatten(0, 1))),
        ):
            yield
        fit(i, _joined(before), _joined(after))

    streamed.run(blocks, around)
    return [{"step": k, "loss": fmean(values)} for k, values in enumerate(zip(*losses, strict=True))]
