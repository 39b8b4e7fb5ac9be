"""Tuning on a task's questions: the adapter layers offsite, or every weight for full fine-tuning (method section 5)."""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.errors import UserError
from scaleot_core.evaluation import lm
from scaleot_core.params import Tuning
from scaleot_core.runtime import generator
from scaleot_core.tasks import Rows, answer_pairs, load_task
from scaleot_core.training import Checkpoint, Optimizer, run_steps, warmup_then_linear

IGNORED = -100  # no loss at this target
BUCKET = 16  # batches whose questions are sorted by length together, so that little is padded

Example = tuple[list[int], list[int]]


def examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, rows: Rows) -> list[Example]:
    """Input tokens and targets of every question, split and cut exactly as lm-eval's scoring does it.

    Targets are those of the right answer, `IGNORED` elsewhere. A question that is too long loses its beginning.
    """
    view = lm(model, tokenizer)
    made = []
    for context, continuation in answer_pairs(load_task(task, rows), tokenizer, context_length=view.max_length):
        before, answer = view._encode_pair(context, continuation)
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
    seed: int,
    label: str,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Train `parameters` of the model in place on the examples; the rest stays as it is. Returns the loss a step."""
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
        optimizer.step(tuning.lr * warmup_then_linear(i, steps, tuning.warmup))
        return {"loss": loss.item(), "tokens": inputs.numel()}

    history = run_steps(step, optimizer, label=label, steps=steps, checkpoint=checkpoint)
    model.requires_grad_(False)
    return history
