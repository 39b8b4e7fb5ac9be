"""Dynamic LayerReplace: harmonizers by deep learning, layer scores by reinforcement learning, together (section 2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.common.random import generator
from scaleot_core.common.validation import check_range
from scaleot_core.compression.harmonizer import Harmonizers
from scaleot_core.models.forward import mean_loss, next_token_loss, swapped_layers
from scaleot_core.settings import Dlr
from scaleot_core.training.blocks import draw_blocks, prepare, update
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.training.loop import run_steps
from scaleot_core.training.optimizer import Optimizer

DISTINCT_DRAWS = 100  # before the draw counts as settled


def sample_kept(scores: Tensor, group_size: int, keep_threshold: float, draw: torch.Generator) -> Tensor:
    """Draw one network: a mask (L,) of the layers kept, True, or replaced by their harmonizers, False.

    π_i ~ U(0, p_i) with p_i = sigmoid(s_i); in every group of `group_size` neighbours, the last taking the remainder,
    the layers at or above the group's median are kept. Of n layers in a group, ⌊n/2⌋ are replaced. A layer whose p_i
    is above `keep_threshold` ranks above those that are not, however the draw falls: replacing an essential layer costs
    so much that its samples would drown the others. The paper's rule is `keep_threshold` = 1, where none does.
    """
    p = torch.sigmoid(scores.double())
    pi = torch.rand(len(scores), generator=draw, dtype=torch.float64) * p + (p > keep_threshold)
    kept = torch.ones(len(scores), dtype=torch.bool)
    for group in torch.arange(len(scores)).split(group_size):
        kept[group[pi[group].argsort()[: len(group) // 2]]] = False
    return kept


def distinct_candidates(
    scores: Tensor, group_size: int, keep_threshold: float, count: int, draw: torch.Generator
) -> list[Tensor]:
    """Draw `count` distinct networks, or fewer where the scores hardly leave others to draw."""
    candidates: list[Tensor] = []
    for _ in range(DISTINCT_DRAWS):
        kept = sample_kept(scores, group_size, keep_threshold, draw)
        if not any(torch.equal(kept, other) for other in candidates):
            candidates.append(kept)
        if len(candidates) == count:
            break
    return candidates


def updated_scores(scores: Tensor, candidates: list[Tensor], losses: Tensor, score_lr: float) -> Tensor:
    """Update the scores: s_i + η · Σ_j r_j · p_i (1 − p_i) over the candidates j that kept layer i.

    r_j = exp(−ℓ_j) − mean_k exp(−ℓ_k). IST, where the rule comes from, credits the suppressed layers instead.
    """
    rewards = (-losses).exp() - (-losses).exp().mean()
    p = torch.sigmoid(scores)
    credit = torch.stack(candidates).to(rewards.dtype).T @ rewards  # (L,)
    return scores + score_lr * credit * p * (1 - p)


@dataclass
class DlrState:
    """What DLR trains: harmonizers, through their optimizer, and scores (L,) in float64."""

    optimizer: Optimizer
    scores: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {**self.optimizer.tensors(), "scores": self.scores}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.scores = tensors.pop("scores")
        self.optimizer.load(tensors)


def validate(dlr: Dlr, *, layers: int, blocks: int) -> None:
    """Raise UserError if a parameter asks for more than a model of `layers` or a corpus of `blocks` can give."""
    check_range("dlr.group_size", dlr.group_size, layers, least=2, most=layers)
    groups = torch.arange(layers).split(dlr.group_size)
    networks = math.prod(math.comb(len(group), len(group) // 2) for group in groups)
    if networks < dlr.candidates:
        raise UserError(
            f"groups of this model give {networks} networks", parameter="dlr.candidates", value=dlr.candidates
        )
    if dlr.score_blocks >= blocks:
        raise UserError(
            f"none of data.train_blocks = {blocks} is left", parameter="dlr.score_blocks", value=dlr.score_blocks
        )


def train(
    model: PreTrainedModel,
    harmonizers: Harmonizers,
    scores: Tensor,
    blocks: Tensor,
    dlr: Dlr,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Train harmonizers in place by next-token cross-entropy of sampled networks; return the scores and the history.

    `model` is frozen. `blocks` (N, T) train the harmonizers, except the last `dlr.score_blocks` of them, from which
    each score update takes one batch to compare its candidates on. The history has `loss` a step, and at score updates
    the best and worst candidate's loss and every layer's score as `score_00` and so on.
    """
    validate(dlr, layers=len(harmonizers), blocks=len(blocks))
    prepare(blocks, model.device)
    blocks, score_blocks = blocks[: -dlr.score_blocks], blocks[-dlr.score_blocks :]
    parameters = {name: p for name, p in harmonizers.named_parameters()}
    state = DlrState(Optimizer(parameters), scores.double().clone())

    def network(kept: Tensor) -> dict[int, nn.Module]:
        return {i: harmonizers[i] for i, keep in enumerate(kept.tolist()) if not keep}

    def update_scores(i: int) -> dict[str, float]:
        draw = generator(seed, "dlr scores", i)
        candidates = distinct_candidates(state.scores, dlr.group_size, dlr.keep_threshold, dlr.candidates, draw)
        heldout = draw_blocks(score_blocks, dlr.batch_blocks, draw)
        losses = []
        for kept in candidates:
            with swapped_layers(model, network(kept)):
                losses.append(mean_loss(model, heldout))
        state.scores = updated_scores(state.scores, candidates, torch.tensor(losses).double(), dlr.score_lr)
        row = {f"score_{layer:02d}": value for layer, value in enumerate(state.scores.tolist())}
        return {"candidate_best": min(losses), "candidate_worst": max(losses), **row}

    def step(i: int) -> dict[str, float]:
        draw = generator(seed, "dlr", i)
        kept = sample_kept(state.scores, dlr.group_size, dlr.keep_threshold, draw)
        sampled = draw_blocks(blocks, dlr.batch_blocks, draw)

        def loss(part: Tensor) -> Tensor:
            with swapped_layers(model, network(kept)):
                return next_token_loss(model, part)

        figures = update(state.optimizer, sampled, loss, dlr, i)
        return figures | (update_scores(i) if (i + 1) % dlr.score_interval == 0 else {})

    history = run_steps(step, state, label="DLR", steps=dlr.steps, checkpoint=checkpoint)
    return state.scores, history
