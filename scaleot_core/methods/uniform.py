"""Offsite-tuning without distillation: the bottom and top layers, and middle layers at even distances.

Source: Xiao et al. 2023 (arXiv 2302.04870), as in `uniform_choose_layers` of github.com/mit-han-lab/offsite-tuning.
"""

from scaleot_core.compression.layer_choice import end_layers
from scaleot_core.compression.plan import ADAPTER, COMPRESSED, REMOVED, Plan
from scaleot_core.methods.base import BuiltEmulator, ModelOwner, largest_fitting


def evenly(layers: list[int], count: int) -> list[int]:
    """Choose `count` layers at even distances, first and last included: of m the round(i · (m − 1) / (n − 1))-th."""
    if count == 1:
        return layers[:1]
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def plan(owner: ModelOwner) -> Plan:
    """Plan adapter layers at the ends, and between them as many layers as the budget has room for, evenly spread."""
    total = owner.shapes.layers
    adapters = end_layers(total, owner.params.adapter_layers)
    middle = [i for i in range(total) if i not in adapters]

    def keeping(count: int) -> Plan:
        stay = set(evenly(middle, count))
        return tuple(ADAPTER if i in adapters else COMPRESSED if i in stay else REMOVED for i in range(total))

    return largest_fitting(owner, range(1, len(middle) + 1), keeping)


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build the emulator: layers are removed, nothing else changes."""
    return owner.emulator_of_whole_layers(plan(owner))
