"""Ways to make an emulator, one module each behind one interface: `method` in params.yaml.

Each gives the emulator's tensors and says what became of every layer. All are fitted to the same bytes, `max_bytes_ratio`
of the model's; without it ScaleOT has those of α and β, and the others are fitted to them.
"""

from collections.abc import Callable

from scaleot_core.methods import crash, distilled, gradot, scaleot, uniform
from scaleot_core.methods.base import BuiltEmulator, ModelOwner

METHODS: dict[str, Callable[[ModelOwner], BuiltEmulator]] = {
    "scaleot": scaleot.build,
    "uniform": uniform.build,
    "distilled": distilled.build,
    "crash": crash.build,
    "gradot": gradot.build,
}
