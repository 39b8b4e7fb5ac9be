"""What never moved: rows and columns of an adapter that are, to the bit, where tuning started.

AdamW moves any weight that ever had a gradient. So what never moved says what never occurred in the records, and what
moved beside it says what did: a package can be built so that this spells the records out (`attacks/hostile_owner.py`).
"""

from collections.abc import Mapping

from torch import Tensor

LEAST = 4  # weights of a row or column: one or two come back to where they were by chance


def unmoved_shares(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, float]:
    """Return, by matrix, the larger of the shares of its rows and of its columns in which no weight moved."""
    shares = {}
    for name, before in start.items():
        if before.ndim == 2:
            same = before.detach().to(tuned[name].device) == tuned[name].detach()
            lines = [same.all(dim) for dim in (0, 1) if same.shape[dim] >= LEAST]
            shares[name] = max((float(line.float().mean()) for line in lines), default=0.0)
    return shares
