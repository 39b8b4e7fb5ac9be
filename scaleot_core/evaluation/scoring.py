"""Score continuations of contexts, each context run once however many continuations it has.

All choices of a question lie in one row behind their common context. A mask lets a token see the context and its own
choice alone, and positions go on from the context's end for each, so that the model computes what it would of each
apart. It is lm-eval's `_loglikelihood_tokens` with less work: the same requests, the same truncation from the left.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.common.progress import Tick
from scaleot_core.models.families import takes_positions
from scaleot_core.models.forward import last_hidden_state, logits_of

Request = tuple[list[int], list[int]]  # the tokens of a context and of its continuation, neither of them empty


@dataclass
class Row:
    """A context with some of its continuations, by the number of their request."""

    context: list[int]
    continuations: dict[int, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the tokens that are run: of a continuation all but the last."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations.values())


def make_rows(requests: Sequence[Request], max_length: int, window: float = math.inf) -> list[Row]:
    """Group requests of the same context into rows, each as long as the model and its attention's window allow.

    With a window of 0 each request has a row of its own.
    Of a request that is longer than `max_length` itself the context loses its beginning. Longest rows come first.
    """
    rows: list[Row] = []
    newest: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        context = context[max(0, len(context) + len(continuation) - 1 - max_length) :]
        row = newest.get(tuple(context))
        if row is None or len(row) + len(continuation) - 1 > min(max_length, window):
            row = newest[tuple(context)] = Row(context)
            rows.append(row)
        row.continuations[number] = continuation
    return sorted(rows, key=len, reverse=True)


def batches_of(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Batch rows so that a batch has `batch_size` requests, or one row of more."""
    batch: list[Row] = []
    for row in rows:
        if batch and sum(len(held.continuations) for held in [*batch, row]) > batch_size:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def score(
    model: PreTrainedModel, requests: Sequence[Request], *, batch_size: int, max_length: int, tick: Tick
) -> list[tuple[float, bool]]:
    """Compute each continuation's log-likelihood (nats, in float32), and whether it is the greedy one.

    `tick` is called once for every request.
    """
    window = getattr(model.config, "sliding_window", None) or math.inf
    rows = make_rows(requests, max_length, window if takes_positions(model.config) else 0)
    alone = [row for row in rows if len(row.continuations) == 1]
    shared = [row for row in rows if len(row.continuations) > 1]
    scores: dict[int, tuple[float, bool]] = {}
    for batch in (*batches_of(shared, batch_size), *batches_of(alone, batch_size)):
        batch_scores = _score_rows(model, batch)
        scores |= batch_scores
        for _ in batch_scores:
            tick(tokens=sum(map(len, batch)) // len(batch_scores))
    return [scores[number] for number in range(len(requests))]


def _score_rows(model: PreTrainedModel, rows: Sequence[Row]) -> dict[int, tuple[float, bool]]:
    """Score a batch of rows in one forward pass; with one continuation each, by the model's own positions and mask."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    owner = torch.full((len(rows), longest), -1)  # 0 for the context, k for the row's k-th continuation, −1 for padding
    at: list[tuple[int, int]] = []  # where every token is predicted that is scored, by row and position
    for r, row in enumerate(rows):
        end = start = len(row.context)
        tokens[r, :start] = torch.tensor(row.context)
        positions[r, :start] = torch.arange(start)
        owner[r, :start] = 0
        for k, continuation in enumerate(row.continuations.values(), start=1):
            more = len(continuation) - 1
            tokens[r, end : end + more] = torch.tensor(continuation[:-1], dtype=torch.long)
            positions[r, end : end + more] = torch.arange(start, start + more)
            owner[r, end : end + more] = k
            at += [(r, start - 1), *((r, end + j) for j in range(more))]
            end += more
    shared = any(len(row.continuations) > 1 for row in rows)
    hidden = last_hidden_state(model, tokens, *([positions, visible(owner)] if shared else []))
    where = torch.tensor(at, device=hidden.device)
    logits = logits_of(model, hidden[where[:, 0], where[:, 1]])
    continuations = [(number, continuation) for row in rows for number, continuation in row.continuations.items()]
    scored = torch.tensor([token for _, continuation in continuations for token in continuation], device=hidden.device)
    likelihoods = logits.log_softmax(-1).gather(1, scored[:, None])[:, 0].cpu()
    greedy = (logits.argmax(-1) == scored).cpu()
    lengths = [len(continuation) for _, continuation in continuations]
    parts = zip(continuations, likelihoods.split(lengths), greedy.split(lengths), strict=True)
    return {number: (likelihood.sum().item(), bool(hit.all())) for (number, _), likelihood, hit in parts}


def visible(owner: Tensor) -> Tensor:
    """Say which token sees which, (B, T, T): those before it of the context and of its own continuation, and itself."""
    same = owner[:, :, None] == owner[:, None, :]
    earlier = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    return (same | (owner == 0)[:, None, :]) & earlier
