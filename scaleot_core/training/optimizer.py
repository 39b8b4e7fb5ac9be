"""AdamW on float32 masters of parameters that compute in a lower precision, and the learning rate's schedule."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scaleot_core.common import distributed
from scaleot_core.training import gradients


class Optimizer:
    """AdamW on float32 masters of parameters that may compute in a lower precision.

    A parameter already in float32 is its own master. Parameters without a gradient are left as they are, moments
    included, which is what DLR needs: only harmonizers that took part move.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float = 0.0, clip: float = 1.0) -> None:
        if not parameters:
            raise ValueError("no parameter to train: name at least one")
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.clip = clip
        groups = [{"params": group} for group in distributed.group_by_sharding(self.masters.values())]
        self.adamw = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    def step(self, lr: float) -> None:
        """Update once from the parameters' gradients, clipped by their common norm; then drop them."""
        self.gather()
        gradients.sum_gradients(self.masters.values())
        gradients.clip_gradients(self.masters.values(), self.clip)
        self.update(self.adamw, lr)

    def gather(self) -> None:
        """Move the parameters' gradients to their masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None

    def update(self, rule: torch.optim.Optimizer, lr: float) -> None:
        """Update the masters once by `rule`, AdamW or what wraps it; then drop the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        rule.step()
        rule.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return masters and moments by name."""
        state = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                state[f"{key}/{name}"] = value
        return state

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors()` returned."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(distributed.distribute_like(tensors[f"master/{name}"], master))
                self.parameters[name].copy_(master)
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
                for key in keys:
                    value = tensors[f"{key}/{name}"]
                    self.adamw.state[master][key] = (
                        value.to(master.device) if key == "step" else distributed.distribute_like(value, master)
                    )


def linear_warmup_decay(step: int, steps: int, warmup: float) -> float:
    """Give the factor of the peak rate at a step: up over the first `warmup` share of the steps, then down to zero."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise + 1)
