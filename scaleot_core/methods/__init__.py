"""Ways to make an emulator, one module each behind one interface: `method` in params.yaml.

Each turns the owner's model into the emulator, in place, and says what became of every layer. All but ScaleOT without a
`budget` are fitted to the same bytes (`budget`).
"""

from collections.abc import Callable

from scaleot_core.methods import crash, distilled, gradot, scaleot, uniform
from scaleot_core.methods.budget import Owner
from scaleot_core.plan import Plan

METHODS: dict[str, Callable[[Owner], Plan]] = {
    "scaleot": scaleot.make,
    "uniform": uniform.make,
    "distilled": distilled.make,
    "crash": crash.make,
    "gradot": gradot.make,
}
