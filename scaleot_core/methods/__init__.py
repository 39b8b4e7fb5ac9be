"""Ways to make an emulator, one module each behind one interface: `method` in params.yaml.

Each gives the emulator's tensors and says what became of every layer. All but ScaleOT without a `budget` are fitted to
the same bytes (`budget`).
"""

from collections.abc import Callable

from scaleot_core.methods import crash, distilled, gradot, scaleot, uniform
from scaleot_core.methods.budget import Made, Owner

METHODS: dict[str, Callable[[Owner], Made]] = {
    "scaleot": scaleot.make,
    "uniform": uniform.make,
    "distilled": distilled.make,
    "crash": crash.make,
    "gradot": gradot.make,
}
