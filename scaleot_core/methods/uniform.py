"""Offsite-tuning without distillation: the bottom and top layers, and middle layers at even distances.

Source: Xiao et al. 2023 (arXiv 2302.04870), as in `uniform_choose_layers` of github.com/mit-han-lab/offsite-tuning.
"""

from scaleot_core import emulator
from scaleot_core.decomposition import plain
from scaleot_core.methods.budget import Made, Owner, largest
from scaleot_core.package import tensors_of
from scaleot_core.plan import Kind, Plan, choose_layers


def evenly(layers: list[int], count: int) -> list[int]:
    """`count` of some layers at even distances, first and last among them: of m the round(i · (m − 1) / (n − 1))-th."""
    if count == 1:
        return layers[:1]
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def plan(owner: Owner) -> Plan:
    """Adapter layers at the ends; as many of the layers between as the budget has room for, the others removed."""
    total = owner.config.num_hidden_layers
    ends = choose_layers([0.0] * total, adapter_layers=owner.params.adapter_layers, alpha=0.0, placement="ends")
    middle = [i for i, kind in enumerate(ends) if kind != "adapter"]

    def keeping(count: int) -> Plan:
        kept = set(evenly(middle, count))
        kinds: list[Kind] = ["removed" if kind != "adapter" and i not in kept else kind for i, kind in enumerate(ends)]
        return owner.plan(tuple(kinds))

    return keeping(largest(owner, range(1, len(middle) + 1), keeping))


def make(owner: Owner) -> Made:
    """The emulator: layers go, nothing else changes."""
    kept, model = plan(owner), owner.load()
    emulator.stand_in(model, kept, plain)
    return Made(kept, tensors_of(model, kept))
