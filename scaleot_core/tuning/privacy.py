"""Differentially private tuning: DP-SGD by Opacus's optimizer and accountant (Abadi et al., CCS 2016).

What is protected is each single example: the returned weights are (ε, δ)-differentially private with regard to adding
or leaving out one. An example is in a step by a coin of its own (Poisson sampling); its gradient, of its own mean loss,
is clipped to norm C; noise of deviation σC is added to the sum. Gradients are taken one example at a time and not by
Opacus's hooks, which give wrong ones where a decoder flattens the batch, as OPT's does.
"""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaleot_core.common.errors import UserError
from scaleot_core.settings import OffsiteTuning
from scaleot_core.training.optimizer import Optimizer

ACCOUNTANT = "prv"  # Gopi et al. 2021: tighter than Rényi's


def _opacus() -> Any:
    try:
        import opacus.accountants.utils  # noqa: F401  # reached through opacus
        import opacus.optimizers
    except ImportError:
        raise UserError("differential privacy needs Opacus: pip install '.[privacy]'") from None
    warnings.filterwarnings("ignore", "Optimal order is the largest alpha")  # of a first, coarser bound
    return opacus


def check(tuning: OffsiteTuning, examples: int) -> None:
    """UserError where δ promises nothing for so many examples."""
    if tuning.delta * examples > 1:
        raise UserError(
            f"above one over the {examples} examples it promises nothing; lower it",
            parameter="offsite_tune.delta",
            value=tuning.delta,
        )


def noise_multiplier(tuning: OffsiteTuning, *, sample_rate: float, steps: int) -> float:
    """σ: the least noise, to Opacus's tolerance, with which so many steps keep to ε; UserError where none does."""
    return _noise_multiplier(tuning.epsilon, tuning.delta, sample_rate, steps)


@cache  # the accountant takes seconds
def _noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    opacus = _opacus()
    try:
        return float(
            opacus.accountants.utils.get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps, accountant=ACCOUNTANT
            )
        )
    except ValueError as error:
        raise UserError(
            f"no noise keeps to it ({error}); raise it", parameter="offsite_tune.epsilon", value=epsilon
        ) from None


def spent(tuning: OffsiteTuning, *, noise: float, sample_rate: float, steps: int) -> float:
    """ε after so many steps, by the accountant."""
    accountant = _opacus().accountants.create_accountant(mechanism=ACCOUNTANT)
    accountant.history = [(noise, sample_rate, steps)]
    return float(accountant.get_epsilon(delta=tuning.delta))


class PrivateOptimizer(Optimizer):
    """AdamW on clipped, noised sums of the gradients of single examples; `add` takes them one by one."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, clip: float, noise: float, batch_size: int
    ) -> None:
        super().__init__(parameters, weight_decay=weight_decay, clip=clip)

        class Noisy(_opacus().optimizers.DPOptimizer):  # type: ignore[misc]
            draw: np.random.Generator

            def add_noise(self) -> None:
                """Opacus's noise from our generator: four draws for one, against attacks on rounding, as it does."""
                for p in self.params:
                    drawn = sum(self.draw.standard_normal(p.shape) for _ in range(4)) / 2
                    noise = torch.from_numpy(np.asarray(drawn)).to(p.summed_grad)
                    p.grad = p.summed_grad + self.noise_multiplier * self.max_grad_norm * noise

        self.private = Noisy(self.adamw, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=batch_size)

    def add(self) -> None:
        """Take the gradients at hand as those of one example: clip them, and add them to the sum.

        An example whose gradient is not finite counts as zero: it must not tell of itself by spoiling all.
        """
        self.gather()
        gradients = {name: master.grad for name, master in self.masters.items()}
        finite = all(g is None or bool(g.isfinite().all()) for g in gradients.values())
        self._take(gradients if finite else {})
        self.private.signal_skip_step(True)
        self.private.step()
        self.private.zero_grad(set_to_none=True)

    def step_with_noise(self, lr: float, draw: np.random.Generator) -> None:
        """One update from the noised sum, also of no example at all."""
        self._take({})
        self.private.draw = draw
        self.update(self.private, lr)

    def _take(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Hand one example's gradients to Opacus, zeros where there is none."""
        for name, master in self.masters.items():
            given = gradients.get(name)
            master.grad_sample = (torch.zeros_like(master) if given is None else given.detach()).unsqueeze(0)  # type: ignore[attr-defined]
