"""Ways to make an emulator, one module each behind one interface: `method` in params.yaml.

Each gives the emulator's tensors and says what became of every layer. All are fitted to the same bytes: to
`max_bytes_ratio` of the model's, or, without it, to those that ScaleOT's emulator has at α and β.
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
