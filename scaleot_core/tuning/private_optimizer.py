"""DP-SGD's optimizer, by Opacus, which has to be installed before this is imported."""

from collections.abc import Mapping

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from scaleot_core.training.optimizer import Optimizer


class _NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    draw: np.random.Generator

    def add_noise(self) -> None:
        """Add Opacus's noise from our generator: four draws for one, against attacks on rounding, as it does."""
        for p in self.params:
            draws = sum(self.draw.standard_normal(p.shape) for _ in range(4)) / 2
            noise = torch.from_numpy(np.asarray(draws)).to(p.summed_grad)
            p.grad = p.summed_grad + self.noise_multiplier * self.max_grad_norm * noise


class PrivateOptimizer(Optimizer):
    """AdamW on clipped, noised sums of the gradients of single examples; `add` takes them one by one."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, clip: float, noise: float, batch_size: int
    ) -> None:
        super().__init__(parameters, weight_decay=weight_decay, clip=clip)
        self.private = _NoisyOptimizer(
            self.adamw, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=batch_size
        )

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
        """Update once from the noised sum, also of no example at all."""
        self._take({})
        self.private.draw = draw
        self.update(self.private, lr)

    def _take(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Hand one example's gradients to Opacus, zeros where there is none."""
        for name, master in self.masters.items():
            gradient = gradients.get(name)
            sample = torch.zeros_like(master) if gradient is None else gradient.detach()
            master.grad_sample = sample.unsqueeze(0)  # type: ignore[attr-defined]
