"""What an adapter says about the records it was tuned on: membership inference, and extraction by prompting.

The attacker is the model owner: it has the real model and the adapter. Two attacks on a record's mean answer loss (nats
a token): a threshold on the plug-in's loss (Yeom et al., CSF 2018), and one on how much lower it is than the base
model's, which takes out how hard the record is (Watson et al., ICLR 2022).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from transformers import PreTrainedModel

from scaleot_core.attacks.capabilities import hidden_by_example
from scaleot_core.common.progress import progress
from scaleot_core.models.forward import logits_of
from scaleot_core.tuning.examples import IGNORED, Example

FALSE_POSITIVES = 0.01  # at which true positives are reported


@dataclass(frozen=True)
class Answer:
    """What a model makes of a record's answer."""

    loss: float
    """Its mean cross-entropy (nats a token)."""
    extracted: bool
    """Whether the model gives all of it greedily, from the prompt."""


@torch.no_grad()
def answers(model: PreTrainedModel, data: Sequence[Example], batch_size: int, label: str) -> list[Answer]:
    """Measure a model on each example's answer, in batches of examples of similar length."""
    by_index: dict[int, Answer] = {}
    with progress(label, len(data)) as tick:
        for i, states, (inputs, targets) in hidden_by_example(model, data, batch_size):
            goals = torch.tensor(targets, device=states.device)
            answer = goals != IGNORED
            logits, right = logits_of(model, states[answer]), goals[answer]
            loss = torch.nn.functional.cross_entropy(logits, right).item()
            by_index[i] = Answer(loss, bool(torch.equal(logits.argmax(-1), right)))
            tick(tokens=len(inputs))
    return [by_index[i] for i in range(len(data))]


@dataclass(frozen=True)
class Roc:
    """How well a score tells members from others."""

    auc: float
    """Area under the ROC curve: 0.5 is a coin."""
    auc_stderr: float
    """Its standard error (Hanley and McNeil 1982)."""
    true_positives: float
    """Share of members recognised where 1 % of the others are taken for members."""


def roc(members: Sequence[float], others: Sequence[float]) -> Roc:
    """Compute the ROC of a score that is higher for members."""
    truth = [1] * len(members) + [0] * len(others)
    score = [*members, *others]
    auc = float(roc_auc_score(truth, score))
    false, true, _ = roc_curve(truth, score, drop_intermediate=False)
    at = float(true[np.searchsorted(false, FALSE_POSITIVES, side="right") - 1])
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    n, m = len(members), len(others)
    variance = (auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (m - 1) * (q2 - auc**2)) / (n * m)
    return Roc(auc, max(0.0, variance) ** 0.5, at)


def attack(base: Sequence[Sequence[Answer]], plugged: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Run both attacks, and extraction, on the answers of members and of others by the base model and the plug-in."""
    losses = [[answer.loss for answer in part] for part in plugged]
    calibrated = [
        [before.loss - after.loss for before, after in zip(*parts, strict=True)]
        for parts in zip(base, plugged, strict=True)
    ]
    members, others = (fmean(answer.extracted for answer in part) for part in plugged)
    return {
        "loss": asdict(roc(*([-loss for loss in part] for part in losses))),
        "calibrated": asdict(roc(*calibrated)),
        "extracted": {"members": members, "others": others},
    }
