"""Differentially private tuning: DP-SGD by Opacus's optimizer and accountant (Abadi et al., CCS 2016).

What is protected is each single example: the returned weights are (ε, δ)-differentially private with regard to adding
or leaving out one. An example is in a step by a coin of its own (Poisson sampling); its gradient, of its own mean loss,
is clipped to norm C; noise of deviation σC is added to the sum. Gradients are taken one example at a time and not by
Opacus's hooks, which give wrong ones where a decoder flattens the batch, as OPT's does.
"""

import hashlib
import warnings
from functools import cache
from typing import Any

import numpy as np

from scaleot_core.common.errors import UserError
from scaleot_core.settings import OffsiteTuning

TIGHT_UP_TO = 20.0  # ε; with the little noise of a larger one the tight accountant takes minutes and more


def _accounting() -> tuple[Any, Any]:
    """Return what makes Opacus's accountant, and what finds the noise by it; UserError where Opacus is missing."""
    try:
        from opacus.accountants import create_accountant
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError:
        raise UserError("differential privacy needs Opacus: pip install '.[privacy]'") from None
    warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha")  # of a coarser bound
    return create_accountant, get_noise_multiplier


def _accountant(epsilon: float) -> str:
    """Name the accountant: the tight one of Gopi et al. 2021, or for a large ε Rényi's, which takes seconds."""
    return "prv" if epsilon <= TIGHT_UP_TO else "rdp"


def check(tuning: OffsiteTuning, examples: int) -> None:
    """Raise UserError where δ promises nothing for so many examples."""
    if tuning.delta * examples > 1:
        raise UserError(
            f"above one over the {examples} examples it promises nothing; lower it",
            parameter="offsite_tune.delta",
            value=tuning.delta,
        )


def noise_multiplier(tuning: OffsiteTuning, *, sample_rate: float, steps: int) -> float:
    """Return σ: the least noise with which so many steps keep to ε, to a tolerance; UserError where none does."""
    return _noise_multiplier(tuning.epsilon, tuning.delta, sample_rate, steps)


@cache  # the accountant takes seconds
def _noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    _, get_noise_multiplier = _accounting()
    target: dict[str, Any] = {
        "target_epsilon": epsilon,
        "target_delta": delta,
        "accountant": _accountant(epsilon),
        "epsilon_tolerance": max(0.01, epsilon / 1000),
    }
    try:
        return float(get_noise_multiplier(**target, sample_rate=sample_rate, steps=steps))
    except ValueError as error:
        raise UserError(
            f"no noise keeps to it ({error}); raise it", parameter="offsite_tune.epsilon", value=epsilon
        ) from None


def spent(tuning: OffsiteTuning, *, noise: float, sample_rate: float, steps: int) -> float:
    """Return ε after so many steps, by the accountant."""
    create_accountant, _ = _accounting()
    accountant = create_accountant(mechanism=_accountant(tuning.epsilon))
    accountant.history = [(noise, sample_rate, steps)]
    return float(accountant.get_epsilon(delta=tuning.delta))


def secret_draw(seed: int, *names: str | int) -> np.random.Generator:
    """Make a generator for one named draw that protects privacy: of 256 bits, where torch's has 32 that count.

    Not a cryptographic one.
    """
    text = ":".join(str(part) for part in (seed, *names))
    entropy = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(entropy)))
