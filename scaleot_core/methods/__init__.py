"""Ways to make an emulator, one module each behind one interface: `method` in params.yaml.

Each gives the emulator's tensors and says what became of every layer. All are fitted to the same bytes: to
`max_bytes_ratio` of the model's, or, without it, `channels` to its `ratio` and the others to the bytes that ScaleOT's
emulator has at α and β. Those that need layer scores are `SCORED_METHODS` of `compression.layer_importance`.
"""

from collections.abc import Callable

from scaleot_core.methods import channels, crash, distilled, gradot, scaleot, uniform
from scaleot_core.methods.base import BuiltEmulator, ModelOwner

METHODS: dict[str, Callable[[ModelOwner], BuiltEmulator]] = {
    "scaleot": scaleot.build,
    "channels": channels.build,
    "uniform": uniform.build,
    "distilled": distilled.build,
    "crash": crash.build,
    "gradot": gradot.build,
}
