"""The data owner's audit of an adapter before it is sent: what can be read from it, against what may be.

It plays the model owner with the means of the data owner: the tuned package stands for the real model with the plug-in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from scaleot_core.attacks import membership
from scaleot_core.compression.plan import Plan
from scaleot_core.tuning.adapters import TunedAdapter, TunedLayers, TunedLora, trainable, tuned_emulator
from scaleot_core.tuning.examples import Example
from scaleot_core.tuning.lora import remove_lora
from scaleot_core.tuning.unmoved import unmoved_shares

LEAST_RECORDS = 10  # on either side, below which an AUC tells nothing
BATCH_SIZE = 8
UNSEEN = (
    "what this can't see: channels that never fall silent but carry a mark, what the real model makes of the adapter, "
    "records that are like those tuned on, and attacks that nobody has thought of; --epsilon bounds these too"
)


@dataclass(frozen=True)
class Limits:
    """What may be read from an adapter that is sent."""

    unmoved: float
    """Share of the rows or columns of any one matrix that never moved."""
    auc: float
    """Area under the ROC curve of the better of two membership attacks."""
    extracted: float
    """Share of answers said word for word, above that of held-out records."""


def unmoved(model: PreTrainedModel, plan: Plan, adapter: TunedAdapter, seed: int) -> dict[str, float]:
    """Return the share of rows or columns of each tuned matrix that never moved; LoRA's A began at the seed's draw."""
    if isinstance(adapter, TunedLayers):
        return unmoved_shares({name: model.get_parameter(name) for name in adapter.weights}, adapter.weights)
    start = TunedLora.from_peft(adapter.form, trainable(model, plan, adapter.form, seed), model.config).to_peft()
    shares = unmoved_shares({name: factor.detach().clone() for name, factor in start.items()}, adapter.to_peft())
    remove_lora(model)
    return shares


def audit(
    model: PreTrainedModel,
    plan: Plan,
    adapter: TunedAdapter,
    members: Sequence[Example],
    others: Sequence[Example],
    *,
    seed: int,
) -> dict[str, Any]:
    """Measure what an adapter tells: `unmoved` by matrix, and the figures of `membership.attack` or None.

    `members` were tuned on, `others` weren't. The emulator is then what it was.
    """
    shares = unmoved(model, plan, adapter, seed)
    if min(len(members), len(others)) < LEAST_RECORDS:
        return {"unmoved": shares, "membership": None}
    sides = (members, others)
    with torch.no_grad():
        base = [membership.answers(model, side, BATCH_SIZE, "package") for side in sides]
        with tuned_emulator(model, plan, adapter):
            tuned = [membership.answers(model, side, BATCH_SIZE, "adapter") for side in sides]
    return {"unmoved": shares, "membership": membership.attack(base, tuned)}


def best_auc(attack: Mapping[str, Any]) -> tuple[float, float]:
    """Return the AUC of the better membership attack, and its standard error."""
    best = max((attack["loss"], attack["calibrated"]), key=lambda roc: float(roc["auc"]))
    return best["auc"], best["auc_stderr"]


def reasons(figures: Mapping[str, Any], limits: Limits) -> list[str]:
    """List why an adapter must not be sent; none where it may."""
    listed = []
    worst = max(figures["unmoved"], key=figures["unmoved"].__getitem__)
    if figures["unmoved"][worst] > limits.unmoved:
        share = figures["unmoved"][worst]
        listed.append(
            f"{share:.1%} of the rows or columns of {worst!r} never moved; those that did can spell records out"
        )
    if (attack := figures["membership"]) is not None:
        auc, error = best_auc(attack)
        if auc > limits.auc and auc - 2 * error > 0.5:
            listed.append(f"who has a record can tell that it was tuned on: AUC {auc:.2f}")
        extracted = attack["extracted"]
        if extracted["members"] - extracted["others"] > limits.extracted:
            listed.append(f"it says {extracted['members']:.0%} of the answers word for word")
    return listed
