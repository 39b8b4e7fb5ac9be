"""The harmonizer: a two-layer perceptron that stands in for one decoder layer (method section 1)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaleot_core.models.forward import StandIn


class Harmonizer(StandIn):
    """h(x) = x + W_up · ReLU(W_down · x + b_down) + b_up, with W_down (r, D) and W_up (D, r).

    Replaces a decoder layer in place, so that the model's own forward runs unchanged. W_up starts at zero: the
    untrained harmonizer is the identity. W_down does not, since a ReLU between two zero matrices passes no gradient.
    """

    def __init__(self, hidden_size: int, rank: int, *, in_tuple: bool = False) -> None:
        super().__init__(in_tuple=in_tuple)
        self.down = nn.Linear(hidden_size, rank)
        self.up = nn.Linear(rank, hidden_size)

    def reset(self, generator: torch.Generator) -> None:
        """Draw W_down anew (Kaiming-uniform for a ReLU) and set the rest to zero."""
        bound = (6 / self.down.in_features) ** 0.5
        with torch.no_grad():
            self.down.weight.copy_(torch.empty(self.down.weight.shape).uniform_(-bound, bound, generator=generator))
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def replacement(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); computed in the weights' own dtype, so float32 while they are trained."""
        x = hidden_states.to(self.down.weight.dtype)
        return hidden_states + self.up(F.relu(self.down(x))).to(hidden_states.dtype)


class Harmonizers(nn.ModuleList):
    """One harmonizer a decoder layer, at the layer's index."""

    def __iter__(self) -> Iterator[Harmonizer]:
        return super().__iter__()  # type: ignore[return-value]
