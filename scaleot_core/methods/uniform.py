"""Offsite-tuning without distillation: the bottom and top layers, and middle layers at even distances.

Source: Xiao et al. 2023 (arXiv 2302.04870), as in `uniform_choose_layers` of github.com/mit-han-lab/offsite-tuning.
"""

from scaleot_core.compression.plan import LayerKind, Plan, choose_layers
from scaleot_core.methods.base import BuiltEmulator, ModelOwner, largest_fitting


def evenly(layers: list[int], count: int) -> list[int]:
    """Choose `count` layers at even distances, first and last included: of m the round(i · (m − 1) / (n − 1))-th."""
    if count == 1:
        return layers[:1]
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def plan(owner: ModelOwner) -> Plan:
    """Adapter layers at the ends; as many of the layers between as the budget has room for, the others removed."""
    total = owner.config.num_hidden_layers
    ends = choose_layers([0.0] * total, adapter_layers=owner.params.adapter_layers, alpha=0.0, placement="ends")
    middle = [i for i, kind in enumerate(ends) if kind != "adapter"]

    def keeping(count: int) -> Plan:
        kept = set(evenly(middle, count))
        kinds: list[LayerKind] = [
            "removed" if kind != "adapter" and i not in kept else kind for i, kind in enumerate(ends)
        ]
        return owner.plan(tuple(kinds))

    return keeping(largest_fitting(owner, range(1, len(middle) + 1), keeping))


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build the emulator: layers are removed, nothing else changes."""
    return owner.emulator_of_whole_layers(plan(owner))
