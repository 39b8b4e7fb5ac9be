"""Tune with what held-out examples decide: the learning rate, and when to stop (method section 5)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from scaleot_core.tuning.examples import Example, Examples
from scaleot_core.tuning.tuner import mean_answer_loss, train, train_privately

History = list[dict[str, float]]
Parameters = dict[str, nn.Parameter]
Fit = Callable[..., History]
Measure = Callable[[], float]


@dataclass(frozen=True)
class TuningResult:
    """What a tuning came to."""

    history: History
    """The loss a step."""
    lr: float
    """The peak learning rate that was taken."""
    steps: int
    """Steps that led to the parameters as they are now."""
    validation_loss: dict[str, float | None]
    """By learning rate, or by epoch, on examples that weren't tuned on; None where a rate diverged."""
    epsilon: float | None = None
    """What the examples' privacy came to, where it was protected."""
    tuned_on: int = 0
    """Records, or blocks of texts, that led to the parameters as they are now."""
    held_out: int = 0
    """Records, or blocks of texts, that the learning rate or the end of training was chosen on."""


class TooFewRecords(UserError):
    """There are too few records to tune on some and hold out others."""


def tune(
    model: PreTrainedModel,
    parameters: Parameters,
    data: Examples,
    tuning: Tuning,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint,
) -> TuningResult:
    """Train, with the learning rate and the end of training chosen on held-out examples.

    Several rates: train on the rest, keep the rate with the lowest held-out loss, retrain on everything. `patience`:
    train on the rest alone, stop once the held-out loss hasn't got better for so many epochs, and keep the best epoch's
    parameters. `validation_fraction` 0: all epochs run on all examples. `epsilon`: `train_privately` instead. UserError
    where all rates diverge, and TooFewRecords.
    """
    count = len(set(data.origins))
    if isinstance(tuning, OffsiteTuning) and tuning.epsilon:
        history, epsilon = train_privately(
            model, parameters, data, tuning, seed=seed, label=label, checkpoint=checkpoint
        )
        return TuningResult(history, tuning.lr[0], len(history), {}, epsilon, tuned_on=count)
    rest, validation, held_out = _split(data, tuning, seed, label)
    fit = partial(train, model, parameters, tuning=tuning, seed=seed)
    measure = partial(mean_answer_loss, model, validation, tuning.batch_size)
    lr, losses = tuning.lr[0], {}
    if held_out and len(tuning.lr) > 1:
        losses = _search_lr(partial(fit, rest), measure, parameters, tuning.lr, label, checkpoint)
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not finite:
            raise UserError(f"{label}: the loss is not finite with any learning rate of {tuning.lr}; name lower ones")
        lr = min(finite, key=finite.__getitem__)
        say(f"{label}: of the learning rates {tuning.lr}, {lr} has the lowest held-out loss")
    if held_out and tuning.patience:
        run = partial(fit, rest, lr=lr, label=label, checkpoint=checkpoint)
        history, steps, epochs = _train_with_early_stopping(
            run, measure, parameters, tuning.patience, label, checkpoint
        )
        by_epoch: dict[str, float | None] = {f"epoch {epoch}": loss for epoch, loss in enumerate(epochs, start=1)}
        return TuningResult(history, lr, steps, by_epoch, tuned_on=count - held_out, held_out=held_out)
    history = fit(data, lr=lr, label=label, checkpoint=checkpoint)
    by_rate = {str(rate): loss for rate, loss in losses.items()}
    return TuningResult(history, lr, len(history), by_rate, tuned_on=count, held_out=held_out)


def _split(data: Examples, tuning: Tuning, seed: int, label: str) -> tuple[list[Example], list[Example], int]:
    """Return the examples to train on, those held out, and of how many records these are, which stay together.

    None are held out where nothing is decided by them. TooFewRecords where none are left to train on.
    """
    records = set(data.origins)
    if not tuning.validation_fraction or (len(tuning.lr) == 1 and not tuning.patience):
        return data, [], 0
    held_out = max(1, round(tuning.validation_fraction * len(records)))
    if held_out >= len(records):
        raise TooFewRecords(
            f"{label}: {len(records)} examples are too few to hold some out; lower `validation_fraction`, set "
            "`patience` to 0 or give more"
        )
    rest, validation = split_records(data, held_out, seed)
    return rest, validation, held_out


def split_records(data: Examples, held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the examples of a seed's draw of `held_out` records, last, and those of the others, first."""
    records: dict[int, list[Example]] = {}
    for origin, example in zip(data.origins, data, strict=True):
        records.setdefault(origin, []).append(example)
    by_number = list(records.values())
    order = torch.randperm(len(records), generator=generator(seed, "validation")).tolist()
    validation, rest = ([e for k in part for e in by_number[k]] for part in (order[:held_out], order[held_out:]))
    return rest, validation


def _search_lr(
    run: Fit, measure: Measure, parameters: Parameters, rates: list[float], label: str, checkpoint: Checkpoint
) -> dict[float, float | None]:
    """Measure each learning rate's held-out loss, None where it diverged; the parameters are then what they were."""
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def loss(lr: float) -> float | None:
        progress = checkpoint.within(f"lr-{lr}")
        try:
            run(lr=lr, label=f"{label}, lr {lr}", checkpoint=progress)
            held_out_loss = measure()
        except Diverged:
            held_out_loss = math.nan
        _restore(parameters, start)
        progress.remove()
        return held_out_loss if math.isfinite(held_out_loss) else None

    return {lr: cached_json(checkpoint.folder / f"lr-{lr}.json", partial(loss, lr)) for lr in rates}


def _train_with_early_stopping(
    run: Fit, measure: Measure, parameters: Parameters, patience: int, label: str, checkpoint: Checkpoint
) -> tuple[History, int, list[float]]:
    """Train until the held-out loss is no better for `patience` epochs; the best epoch's parameters stay.

    Return the history, the best epoch's steps and every epoch's loss.
    """
    losses: list[float] = []
    steps: list[int] = []

    def saved(epoch: int) -> Path:
        return checkpoint.folder / f"epoch-{epoch}.safetensors"

    def measure_epoch(epoch: int) -> float:
        write_tensors(saved(epoch), parameters)
        loss = measure()
        if not math.isfinite(loss):
            raise Diverged(f"{label}: the held-out loss is {loss} after epoch {epoch + 1}; lower the learning rate")
        return loss

    def no_better(epoch: int, step: int) -> bool:
        losses.append(cached_json(checkpoint.folder / f"epoch-{epoch}.json", partial(measure_epoch, epoch)))
        steps.append(step)
        best = losses.index(min(losses))
        for other in range(epoch + 1):
            if other != best:
                saved(other).unlink(missing_ok=True)
        say(f"{label}: held-out loss {losses[-1]:.4f} after epoch {epoch + 1}; the best is {losses[best]:.4f}")
        return epoch - best >= patience

    history = run(after_epoch=no_better)
    best = losses.index(min(losses))
    _restore(parameters, read_tensors(saved(best)))
    return history, steps[best], losses


@torch.no_grad()
def _restore(parameters: Parameters, values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(distributed.distribute_like(values[name], parameter))
