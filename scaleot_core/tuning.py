"""Tuning on a task's questions: the adapter layers offsite, or every weight for full fine-tuning (method section 5)."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.errors import UserError
from scaleot_core.evaluation import lm
from scaleot_core.files import once
from scaleot_core.params import Tuning
from scaleot_core.progress import say
from scaleot_core.runtime import generator
from scaleot_core.tasks import Rows, answer_pairs, load_task, texts
from scaleot_core.training import Checkpoint, Diverged, Optimizer, run_steps, warmup_then_linear

IGNORED = -100  # no loss at this target
BUCKET = 16  # batches whose questions are sorted by length together, so that little is padded

Example = tuple[list[int], list[int]]


def examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, rows: Rows, *, block_size: int
) -> list[Example]:
    """Input tokens and targets of every question, split and cut exactly as lm-eval's scoring does it.

    Targets are those of the right answer, `IGNORED` elsewhere; an answer that evaluation generates ends in the
    end-of-text token, so that the model learns to stop. A question that is too long loses its beginning. Texts that are
    scored as a whole come in blocks of `block_size` tokens, each of which is a target.
    """
    view, loaded = lm(model, tokenizer), load_task(task, rows)
    ends = loaded.OUTPUT_TYPE != "multiple_choice"
    if ends and tokenizer.eos_token_id is None:
        raise UserError(f"task {task}: the model's tokenizer has no end-of-text token to end a text with; use another")
    made = []
    if loaded.OUTPUT_TYPE == "loglikelihood_rolling":
        tokens = [token for text in texts(loaded) for token in [*view.tok_encode(text), tokenizer.eos_token_id]]
        cuts = (tokens[start : start + block_size + 1] for start in range(0, len(tokens) - 1, block_size))
        made = [(block[:-1], block[1:]) for block in cuts]
    else:
        for context, continuation in answer_pairs(loaded, tokenizer, context_length=view.max_length):
            before, answer = view._encode_pair(context, continuation)
            answer = [*answer, tokenizer.eos_token_id] if ends else answer
            tokens = (before + answer)[-(view.max_length + 1) :]
            made.append((tokens[:-1], ([IGNORED] * len(tokens) + answer)[-len(tokens) + 1 :]))
    if not made:
        raise UserError(f"task {task}: there are no training questions")
    return made


def collate(batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), padded on the right, where a causal model's answer tokens never look."""
    width = max(len(tokens) for tokens, _ in batch)
    inputs = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch])
    targets = torch.tensor([goal + [IGNORED] * (width - len(goal)) for _, goal in batch])
    return inputs, targets


def answer_loss(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) over the answer tokens; the head is computed only where there is one."""
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state  # (B, T, D)
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


def tune(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    data: list[Example],
    tuning: Tuning,
    *,
    lr: float,
    seed: int,
    label: str,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Train `parameters` of the model in place on the examples; the rest stays as it is. Returns the loss a step.

    `lr` is the peak learning rate, from `tuning.lr`.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = Optimizer(parameters, weight_decay=tuning.weight_decay, clip=tuning.clip)
    lengths = [len(tokens) for tokens, _ in data]
    an_epoch = math.ceil(len(data) / tuning.batch_size)
    steps = an_epoch * tuning.epochs
    if tuning.max_steps:
        steps = min(steps, tuning.max_steps)

    def step(i: int) -> dict[str, float]:
        batches = epoch_batches(lengths, tuning.batch_size, generator(seed, "tuning", i // an_epoch))
        inputs, targets = collate([data[k] for k in batches[i % an_epoch]])
        loss = answer_loss(model, inputs.to(model.device), targets.to(model.device))
        loss.backward()
        optimizer.step(lr * warmup_then_linear(i, steps, tuning.warmup))
        return {"loss": loss.item(), "tokens": inputs.numel()}

    history = run_steps(step, optimizer, label=label, steps=steps, checkpoint=checkpoint)
    model.requires_grad_(False)
    return history


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


def choose_rate(
    model: PreTrainedModel,
    parameters: dict[str, nn.Parameter],
    data: list[Example],
    tuning: Tuning,
    *,
    seed: int,
    label: str,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """The best of several learning rates, as `lr`, and the `validation_loss` of each, None where it diverged.

    Each is tuned with on most of the examples and scored on the rest (method section 5); the parameters are then what
    they were before. One rate alone is taken as it is. UserError where there are too few examples, or all diverge.
    """
    if len(tuning.lr) == 1:
        return {"lr": tuning.lr[0], "validation_loss": {}}
    order = torch.randperm(len(data), generator=generator(seed, "validation")).tolist()
    held = max(1, round(tuning.validation * len(data)))
    if held == len(data):
        raise UserError(f"{label}: one training question can't be parted to compare learning rates; name one in `lr`")
    validation, rest = ([data[i] for i in part] for part in (order[:held], order[held:]))
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def loss(lr: float) -> float | None:
        try:
            at = checkpoint.within(f"lr-{lr}")
            tune(model, parameters, rest, tuning, lr=lr, seed=seed, label=f"{label}, lr {lr}", checkpoint=at)
            found = mean_answer_loss(model, validation, tuning.batch_size)
        except Diverged:
            found = math.nan
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        at.remove()
        return found if math.isfinite(found) else None

    losses = {lr: once(checkpoint.folder / f"lr-{lr}.json", partial(loss, lr)) for lr in tuning.lr}
    finite = {lr: value for lr, value in losses.items() if value is not None}
    if not finite:
        raise UserError(f"{label}: the loss is not finite with any learning rate of {tuning.lr}; name lower ones")
    best = min(finite, key=finite.__getitem__)
    say(f"{label}: of {', '.join(map(str, tuning.lr))} the learning rate {best} has the lowest validation loss")
    return {"lr": best, "validation_loss": {str(lr): value for lr, value in losses.items()}}
