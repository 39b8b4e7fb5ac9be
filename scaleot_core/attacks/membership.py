"""What an adapter says about the records it was tuned on: membership inference, and extraction by prompting.

The attacker is the model owner: it has the real model and the adapter. Two attacks on a record's mean answer loss (nats
a token): a threshold on the plug-in's loss (Yeom et al., CSF 2018), and one on how much lower it is than the base
model's, which takes out how hard the record is (Watson et al., ICLR 2022).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.compression.plan import Plan
from scaleot_core.models.forward import last_hidden_state, logits_of
from scaleot_core.tuning.adapters import TunedAdapter, plugged_in
from scaleot_core.tuning.examples import IGNORED, Example, collate
from scaleot_core.tuning.tuner import answer_loss

FALSE_POSITIVES = 0.01  # at which true positives are reported


@torch.no_grad()
def losses(model: PreTrainedModel, data: Sequence[Example]) -> list[float]:
    """Compute each example's mean answer loss (nats per token)."""
    found = []
    for example in data:
        inputs, targets = collate([example])
        found.append(answer_loss(model, inputs.to(model.device), targets.to(model.device)).item())
    return found


@dataclass(frozen=True)
class Roc:
    """How well a score tells members from others."""

    auc: float
    """Area under the ROC curve: 0.5 is a coin."""
    auc_stderr: float
    """Its standard error (Hanley and McNeil 1982)."""
    true_positives: float
    """Share of members found where 1 % of the others are taken for members."""
    curve: list[tuple[float, float]]
    """False and true positive rates."""


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
    return Roc(auc, max(0.0, variance) ** 0.5, at, list(zip(false.tolist(), true.tolist(), strict=True)))


def inference(
    base: tuple[Sequence[float], Sequence[float]], plugged: tuple[Sequence[float], Sequence[float]]
) -> dict[str, Roc]:
    """Run both attacks on the losses of members and others under the base model and the plug-in."""
    calibrated = [
        [b - p for b, p in zip(before, after, strict=True)] for before, after in zip(base, plugged, strict=True)
    ]
    return {
        "loss": roc([-loss for loss in plugged[0]], [-loss for loss in plugged[1]]),
        "calibrated": roc(*calibrated),
    }


@torch.no_grad()
def extracted(model: PreTrainedModel, data: Sequence[Example]) -> float:
    """Measure the share of examples whose whole answer the model says by itself, greedily, from the prompt."""
    found = 0
    for example in data:
        inputs, targets = collate([example])
        hidden = last_hidden_state(model, inputs)
        wanted = targets[0] != IGNORED
        said: Tensor = logits_of(model, hidden[0][wanted.to(hidden.device)]).argmax(-1).cpu()
        found += bool(torch.equal(said, targets[0][wanted]))
    return found / len(data)


def attack(
    model: PreTrainedModel, plan: Plan, tuned: TunedAdapter, members: Sequence[Example], others: Sequence[Example]
) -> dict[str, Any]:
    """Both attacks and extraction with one adapter plugged into the real model, which is then as it was."""
    base = losses(model, members), losses(model, others)
    with plugged_in(model, plan, tuned):
        plugged = losses(model, members), losses(model, others)
        said = {"members": extracted(model, members), "others": extracted(model, others)}
    return {name: asdict(found) for name, found in inference(base, plugged).items()} | {"extracted": said}


def without_curve(figures: dict[str, Any]) -> dict[str, Any]:
    """Drop the curve from an attack's figures."""
    return {name: value for name, value in figures.items() if name != "curve"}
