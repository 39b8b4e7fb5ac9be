"""Tuning: the adapter layers offsite, or every weight for full fine-tuning (method section 5)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core import parallel, privacy
from scaleot_core.errors import UserError
from scaleot_core.examples import IGNORED, Example, collate
from scaleot_core.files import once, read_tensors, write_tensors
from scaleot_core.models import run_stack
from scaleot_core.params import OffsiteTuning, Tuning
from scaleot_core.progress import say
from scaleot_core.runtime import generator, secret_draw
from scaleot_core.training import Checkpoint, Diverged, Optimizer, run_steps, warmup_then_linear

BUCKET = 16  # batches whose questions are sorted by length together, so that little is padded


def answer_loss(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) over the answer tokens; the head is computed only where there is one."""
    hidden = run_stack(model, inputs)  # (B, T, D)
    wanted = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[wanted]).float()
    return nn.functional.cross_entropy(logits, targets[wanted])


def epoch_batches(lengths: list[int], batch_size: int, draw: torch.Generator) -> list[list[int]]:
    """One epoch's batches of indices: shuffled, of similar length within a bucket, in shuffled order."""
    order = torch.randperm(len(lengths), generator=draw).tolist()
    batches = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = sorted(order[start : start + batch_size * BUCKET], key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def _answers(batch: list[Example]) -> int:
    return sum(target != IGNORED for _, goal in batch for target in goal)


def _step_count(tuning: Tuning, examples: int) -> int:
    """How many steps a tuning takes, if nothing ends it earlier."""
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
    """Train `parameters` of the model in place on the examples; the rest stays as it is. Returns the loss a step.

    `lr` is the peak learning rate. `after_epoch` is called with the number of an epoch, from 0, and of the steps up to
    its end; training stops where it says true.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = Optimizer(parameters, weight_decay=tuning.weight_decay, clip=tuning.clip)
    lengths = [len(tokens) for tokens, _ in data]
    an_epoch, steps = math.ceil(len(data) / tuning.batch_size), _step_count(tuning, len(data))

    def step(i: int) -> dict[str, float]:
        batches = epoch_batches(lengths, tuning.batch_size, generator(seed, "tuning", i // an_epoch))
        tokens = 0

        def loss(part: list[Example]) -> Tensor:
            nonlocal tokens
            inputs, targets = collate(part)
            tokens = inputs.numel()
            return answer_loss(model, inputs.to(model.device), targets.to(model.device))

        value = parallel.backward([data[k] for k in batches[i % an_epoch]], loss, _answers)
        optimizer.step(lr * warmup_then_linear(i, steps, tuning.warmup))
        return {"loss": value, "tokens": parallel.total(tokens)}

    ends = range(an_epoch, steps + an_epoch, an_epoch) if after_epoch else [steps]
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
    """`train` with differential privacy (`privacy`): the loss a step, and ε as the accountant has it.

    Whoever knows the seed knows the noise. UserError where the settings would break the promise, or Opacus is missing.
    """
    privacy.check(tuning, len(data))
    rate = min(1.0, tuning.batch_size / len(data))
    steps = _step_count(tuning, len(data))
    noise = privacy.noise_multiplier(tuning, sample_rate=rate, steps=steps)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = privacy.PrivateOptimizer(
        parameters, weight_decay=tuning.weight_decay, clip=tuning.clip, noise=noise, batch_size=tuning.batch_size
    )

    def step(i: int) -> dict[str, float]:
        losses, tokens = [], 0
        for k in np.flatnonzero(secret_draw(seed, "sampling", i).random(len(data)) < rate):
            inputs, targets = collate([data[k]])
            loss = answer_loss(model, inputs.to(model.device), targets.to(model.device))
            loss.backward()
            optimizer.add()
            losses.append(loss.item())
            tokens += inputs.numel()
        draw = secret_draw(seed, "noise", i)
        optimizer.step_with_noise(tuning.lr[0] * warmup_then_linear(i, steps, tuning.warmup), draw)
        known = [loss for loss in losses if math.isfinite(loss)]  # one record must not end the run
        return {"loss": sum(known) / max(1, len(known)), "examples": len(losses), "tokens": tokens}

    history = run_steps(step, optimizer, label=label, steps=steps, checkpoint=checkpoint)
    model.requires_grad_(False)
    return history, privacy.spent(tuning, noise=noise, sample_rate=rate, steps=steps)


@torch.no_grad()
def mean_answer_loss(model: PreTrainedModel, data: list[Example], batch_size: int) -> float:
    """Mean cross-entropy (nats) over the answer tokens of all examples."""
    total, count = 0.0, 0
    order = sorted(range(len(data)), key=lambda i: len(data[i][0]))
    for start in range(0, len(order), batch_size):
        inputs, targets = collate([data[i] for i in order[start : start + batch_size]])
        tokens = int((targets != IGNORED).sum())
        total += answer_loss(model, inputs.to(model.device), targets.to(model.device)).item() * tokens
        count += tokens
    return total / count


@dataclass(frozen=True)
class Tuned:
    """How a tuning went."""

    history: list[dict[str, float]]
    """The loss a step."""
    lr: float
    """The peak learning rate that was taken."""
    steps: int
    """Steps that led to the parameters as they are now."""
    validation_loss: dict[str, float | None]
    """By learning rate, or by epoch, on examples that weren't tuned on; None where a rate diverged."""
    epsilon: float | None = None
    """What the examples' privacy came to, where it was protected."""


def tune(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    data: list[Example],
    tuning: Tuning,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint,
) -> Tuned:
    """`train`, with what the examples themselves can decide: the learning rate, and when to stop.

    Of several rates the one is taken that is best on a share of the examples after training on the others; then all are
    trained on. With `patience` that share is never trained on: training stops once its loss hasn't got better for so
    many epochs, and the best epoch's parameters stay. With `epsilon` it is `train_privately` instead. UserError where
    there are too few examples, or all rates diverge.
    """
    how: dict[str, Any] = {"seed": seed, "label": label, "checkpoint": checkpoint}
    if isinstance(tuning, OffsiteTuning) and tuning.epsilon:
        history, epsilon = train_privately(model, parameters, data, tuning, **how)
        return Tuned(history, tuning.lr[0], len(history), {}, epsilon)
    if len(tuning.lr) == 1 and not tuning.patience:
        history = train(model, parameters, data, tuning, lr=tuning.lr[0], **how)
        return Tuned(history, tuning.lr[0], len(history), {})
    order = torch.randperm(len(data), generator=generator(seed, "validation")).tolist()
    held = max(1, round(tuning.validation * len(data)))
    if held >= len(data):
        raise UserError(f"{label}: {len(data)} examples are too few to hold some out; lower `validation` or give more")
    validation, rest = ([data[i] for i in part] for part in (order[:held], order[held:]))
    lr, losses = tuning.lr[0], {}
    if len(tuning.lr) > 1:
        losses = _rates(model, parameters, rest, validation, tuning, **how)
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not finite:
            raise UserError(f"{label}: the loss is not finite with any learning rate of {tuning.lr}; name lower ones")
        lr = min(finite, key=finite.__getitem__)
        say(f"{label}: of the learning rates {tuning.lr}, {lr} has the lowest held-out loss")
    if tuning.patience:
        history, steps, epochs = _until_no_better(model, parameters, rest, validation, tuning, lr=lr, **how)
        return Tuned(history, lr, steps, {f"epoch {epoch}": loss for epoch, loss in enumerate(epochs, start=1)})
    history = train(model, parameters, data, tuning, lr=lr, **how)
    return Tuned(history, lr, len(history), {str(rate): loss for rate, loss in losses.items()})


def _rates(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    rest: list[Example],
    validation: list[Example],
    tuning: Tuning,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint,
) -> dict[float, float | None]:
    """The validation loss of each learning rate, None where it diverged; the parameters are then what they were."""
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def loss(lr: float) -> float | None:
        own = checkpoint.within(f"lr-{lr}")
        try:
            train(model, parameters, rest, tuning, lr=lr, seed=seed, label=f"{label}, lr {lr}", checkpoint=own)
            found = mean_answer_loss(model, validation, tuning.batch_size)
        except Diverged:
            found = math.nan
        _put(parameters, start)
        own.remove()
        return found if math.isfinite(found) else None

    return {lr: once(checkpoint.folder / f"lr-{lr}.json", partial(loss, lr)) for lr in tuning.lr}


def _until_no_better(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    rest: list[Example],
    validation: list[Example],
    tuning: Tuning,
    *,
    lr: float,
    seed: int,
    label: str,
    checkpoint: Checkpoint,
) -> tuple[list[dict[str, float]], int, list[float]]:
    """Train until the validation loss is no better for `patience` epochs; the best epoch's parameters stay.

    Returns the history, the best epoch's steps and every epoch's loss.
    """
    losses: list[float] = []
    steps: list[int] = []

    def kept(epoch: int) -> Path:
        return checkpoint.folder / f"epoch-{epoch}.safetensors"

    def measure(epoch: int) -> float:
        write_tensors(kept(epoch), parameters)
        loss = mean_answer_loss(model, validation, tuning.batch_size)
        if not math.isfinite(loss):
            raise Diverged(f"{label}: the held-out loss is {loss} after epoch {epoch + 1}; lower the learning rate")
        return loss

    def no_better(epoch: int, step: int) -> bool:
        losses.append(once(checkpoint.folder / f"epoch-{epoch}.json", partial(measure, epoch)))
        steps.append(step)
        best = losses.index(min(losses))
        for other in range(epoch + 1):
            if other != best:
                kept(other).unlink(missing_ok=True)
        say(f"{label}: held-out loss {losses[-1]:.4f} after epoch {epoch + 1}; the best is {losses[best]:.4f}")
        return epoch - best >= tuning.patience

    history = train(
        model, parameters, rest, tuning, lr=lr, seed=seed, label=label, checkpoint=checkpoint, after_epoch=no_better
    )
    best = losses.index(min(losses))
    _put(parameters, read_tensors(kept(best)))
    return history, steps[best], losses


@torch.no_grad()
def _put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(parallel.placed(values[name], parameter))
