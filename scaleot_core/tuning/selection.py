"""Tune with what held-out examples decide: the learning rate, and when to stop (method section 5)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common import distributed
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import cached_json
from scaleot_core.common.progress import say
from scaleot_core.common.random import generator
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.settings import OffsiteTuning, Tuning
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import Diverged
from scaleot_core.tuning.examples import Example
from scaleot_core.tuning.tuner import mean_answer_loss, train, train_privately


@dataclass(frozen=True)
class TuningResult:
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
    origins: Sequence[int] | None = None,
) -> TuningResult:
    """Train, with the learning rate and the end of training chosen on held-out examples.

    Of several rates the one is taken that is best on a share of the examples after training on the others; then all are
    trained on. With `patience` that share is never trained on: training stops once its loss hasn't got better for so
    many epochs, and the best epoch's parameters stay. Without a share (`validation_fraction` is 0) all epochs run on
    all examples. With `epsilon` it is `train_privately` instead. `origins` has the number of the record that each
    example comes from, where several come from one: they are held out together. UserError where there are too few
    examples, or all rates diverge.
    """
    how: dict[str, Any] = {"seed": seed, "label": label, "checkpoint": checkpoint}
    if isinstance(tuning, OffsiteTuning) and tuning.epsilon:
        history, epsilon = train_privately(model, parameters, data, tuning, **how)
        return TuningResult(history, tuning.lr[0], len(history), {}, epsilon)
    records = [[i] for i in range(len(data))] if origins is None else _by_record(origins)
    held = held_out(tuning, len(records))
    if not held:
        history = train(model, parameters, data, tuning, lr=tuning.lr[0], **how)
        return TuningResult(history, tuning.lr[0], len(history), {})
    if held >= len(records):
        raise UserError(
            f"{label}: {len(records)} examples are too few to hold some out; lower `validation_fraction`, set "
            "`patience` to 0 or give more"
        )
    order = torch.randperm(len(records), generator=generator(seed, "validation")).tolist()
    validation, rest = ([data[i] for k in part for i in records[k]] for part in (order[:held], order[held:]))
    lr, losses = tuning.lr[0], {}
    if len(tuning.lr) > 1:
        losses = _search_lr(model, parameters, rest, validation, tuning, **how)
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not finite:
            raise UserError(f"{label}: the loss is not finite with any learning rate of {tuning.lr}; name lower ones")
        lr = min(finite, key=finite.__getitem__)
        say(f"{label}: of the learning rates {tuning.lr}, {lr} has the lowest held-out loss")
    if tuning.patience:
        history, steps, epochs = _train_with_early_stopping(model, parameters, rest, validation, tuning, lr=lr, **how)
        return TuningResult(history, lr, steps, {f"epoch {epoch}": loss for epoch, loss in enumerate(epochs, start=1)})
    history = train(model, parameters, data, tuning, lr=lr, **how)
    return TuningResult(history, lr, len(history), {str(rate): loss for rate, loss in losses.items()})


def held_out(tuning: Tuning, records: int) -> int:
    """Count the records that are held out of training: none where nothing is decided by them."""
    if not tuning.validation_fraction or (len(tuning.lr) == 1 and not tuning.patience):
        return 0
    return max(1, round(tuning.validation_fraction * records))


def _by_record(origins: Sequence[int]) -> list[list[int]]:
    """Group the examples' numbers by record."""
    by_record: dict[int, list[int]] = {}
    for i, origin in enumerate(origins):
        by_record.setdefault(origin, []).append(i)
    return list(by_record.values())


def _search_lr(
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
    """Measure each learning rate's held-out loss, None where it diverged; the parameters are then what they were."""
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def loss(lr: float) -> float | None:
        own = checkpoint.within(f"lr-{lr}")
        try:
            train(model, parameters, rest, tuning, lr=lr, seed=seed, label=f"{label}, lr {lr}", checkpoint=own)
            held_out_loss = mean_answer_loss(model, validation, tuning.batch_size)
        except Diverged:
            held_out_loss = math.nan
        _restore(parameters, start)
        own.remove()
        return held_out_loss if math.isfinite(held_out_loss) else None

    return {lr: cached_json(checkpoint.folder / f"lr-{lr}.json", partial(loss, lr)) for lr in tuning.lr}


def _train_with_early_stopping(
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
        losses.append(cached_json(checkpoint.folder / f"epoch-{epoch}.json", partial(measure, epoch)))
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
    _restore(parameters, read_tensors(kept(best)))
    return history, steps[best], losses


@torch.no_grad()
def _restore(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(distributed.distribute_like(values[name], parameter))
