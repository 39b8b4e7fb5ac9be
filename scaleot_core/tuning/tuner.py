"""Train parameters on examples: the adapters offsite, or every weight for full fine-tuning (method section 5)."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common import distributed
from scaleot_core.common.kernels import choose_attention
from scaleot_core.common.random import generator
from scaleot_core.models.forward import last_hidden_state, logits_of
from scaleot_core.settings import OffsiteTuning, Tuning
from scaleot_core.training import gradients
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import run_steps
from scaleot_core.training.optimizer import Optimizer, linear_warmup_decay
from scaleot_core.tuning import privacy
from scaleot_core.tuning.examples import IGNORED, Example, collate

BUCKET = 16  # batches whose questions are sorted by length together, so that little is padded


def answer_loss(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats) over the answer tokens; the head is computed only where there is one."""
    hidden = last_hidden_state(model, inputs)  # (B, T, D)
    is_answer = targets != IGNORED  # (B, T)
    return nn.functional.cross_entropy(logits_of(model, hidden[is_answer]), targets[is_answer])


def epoch_batches(lengths: list[int], batch_size: int, draw: torch.Generator) -> list[list[int]]:
    """Return one epoch's batches of indices: shuffled, of similar length within a bucket, in shuffled order."""
    order = torch.randperm(len(lengths), generator=draw).tolist()
    batches = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = sorted(order[start : start + batch_size * BUCKET], key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def _answers(batch: list[Example]) -> int:
    return sum(target != IGNORED for _, goal in batch for target in goal)


def _step_count(tuning: Tuning, examples: int) -> int:
    """Count the steps that a tuning takes, if nothing ends it earlier."""
    steps = math.ceil(examples / tuning.batch_size) * tuning.epochs
    return min(steps, tuning.max_steps) if tuning.max_steps else steps


def train(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    data: list[Example],
    tuning: Tuning,
    *,
    lr: float,
    seed: int,
    label: str,
    checkpoint: Checkpoint | None = None,
    after_epoch: Callable[[int, int], bool] | None = None,
) -> list[dict[str, float]]:
    """Train `parameters` of the model in place on the examples, and return the loss a step; the rest stays as it is.

    `lr` is the peak learning rate. `after_epoch` is called with the number of an epoch, from 0, and of the steps up to
    its end; training stops where it says true.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = Optimizer(parameters, weight_decay=tuning.weight_decay, clip=tuning.max_grad_norm)
    lengths = [len(tokens) for tokens, _ in data]
    choose_attention(model.device, max(lengths))
    epoch_steps, steps = math.ceil(len(data) / tuning.batch_size), _step_count(tuning, len(data))

    @lru_cache(1)
    def batches(epoch: int) -> list[list[int]]:
        return epoch_batches(lengths, tuning.batch_size, generator(seed, "tuning", epoch))

    def step(i: int) -> dict[str, float]:
        tokens = 0

        def loss(part: list[Example]) -> Tensor:
            nonlocal tokens
            inputs, targets = collate(part)
            tokens = inputs.numel()
            return answer_loss(model, inputs.to(model.device), targets.to(model.device))

        epoch, number = divmod(i, epoch_steps)
        value = gradients.backward([data[k] for k in batches(epoch)[number]], loss, _answers)
        optimizer.step(lr * linear_warmup_decay(i, steps, tuning.warmup_ratio))
        return {"loss": value, "tokens": distributed.all_reduce_sum(tokens)}

    ends = range(epoch_steps, steps + epoch_steps, epoch_steps) if after_epoch else [steps]
    history: list[dict[str, float]] = []
    for epoch, end in enumerate(min(end, steps) for end in ends):
        history = run_steps(step, optimizer, label=label, steps=end, checkpoint=checkpoint)
        if after_epoch:
            if checkpoint and len(history) == end:
                checkpoint.save(optimizer, end)
            if after_epoch(epoch, end):
                break
    model.requires_grad_(False)
    return history


def train_privately(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    data: list[Example],
    tuning: OffsiteTuning,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint | None = None,
) -> tuple[list[dict[str, float]], float]:
    """Train with differential privacy (`privacy`); return the loss a step, and ε as the accountant has it.

    Whoever knows the seed knows the noise. UserError where the settings would break the promise, or Opacus is missing.
    """
    privacy.check(tuning, len(data))
    rate = min(1.0, tuning.batch_size / len(data))
    steps = _step_count(tuning, len(data))
    noise = privacy.noise_multiplier(tuning, sample_rate=rate, steps=steps)
    from scaleot_core.tuning.private_optimizer import PrivateOptimizer  # needs Opacus, whose absence is told by now

    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = PrivateOptimizer(
        parameters,
        weight_decay=tuning.weight_decay,
        clip=tuning.max_grad_norm,
        noise=noise,
        batch_size=tuning.batch_size,
    )
    choose_attention(model.device, max(len(tokens) for tokens, _ in data))

    def step(i: int) -> dict[str, float]:
        losses, tokens = [], 0
        for k in np.flatnonzero(privacy.secret_draw(seed, "sampling", i).random(len(data)) < rate):
            inputs, targets = collate([data[k]])
            loss = answer_loss(model, inputs.to(model.device), targets.to(model.device))
            loss.backward()
            optimizer.add()
            losses.append(loss.item())
            tokens += inputs.numel()
        draw = privacy.secret_draw(seed, "noise", i)
        optimizer.step_with_noise(tuning.lr[0] * linear_warmup_decay(i, steps, tuning.warmup_ratio), draw)
        finite = [loss for loss in losses if math.isfinite(loss)]  # one record must not end the run
        return {"loss": sum(finite) / max(1, len(finite)), "examples": len(losses), "tokens": tokens}

    history = run_steps(step, optimizer, label=label, steps=steps, checkpoint=checkpoint)
    model.requires_grad_(False)
    return history, privacy.spent(tuning, noise=noise, sample_rate=rate, steps=steps)


@torch.no_grad()
def mean_answer_loss(model: PreTrainedModel, data: list[Example], batch_size: int) -> float:
    """Return the mean cross-entropy (nats) over the answer tokens of all examples."""
    total, count = 0.0, 0
    order = sorted(range(len(data)), key=lambda i: len(data[i][0]))
    for start in range(0, len(order), batch_size):
        inputs, targets = collate([data[i] for i in order[start : start + batch_size]])
        tokens = int((targets != IGNORED).sum())
        total += answer_loss(model, inputs.to(model.device), targets.to(model.device)).item() * tokens
        count += tokens
    return total / count
