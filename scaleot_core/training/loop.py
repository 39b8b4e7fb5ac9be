"""A training loop that stops where it should, resumes to the same bytes, and refuses to go on with a NaN.

Every random draw of a step is a function of the seed and the step's number (`runtime.generator`), so a checkpoint
holds tensors and a step count, and no generator state. It lies in an undeclared scratch folder: a DVC output that
persists would make a run with other parameters resume this one's state.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scaleot_core.common import distributed
from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import progress
from scaleot_core.training.checkpoint import Checkpoint, State


class Diverged(UserError):
    """A loss that is not finite."""


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag that is read between steps, never in the middle of an update."""
    caught = []
    previous = {
        s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_steps(
    step: Callable[[int], Mapping[str, float]],
    state: State,
    *,
    label: str,
    steps: int,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Call `step(i)` for i = 0 .. steps − 1 from the last checkpoint on; return one row of figures a step.

    A step returns figures, among them `loss` and optionally `tokens`. Raises Diverged when the loss is not finite,
    and KeyboardInterrupt, after saving, when interrupted.
    """
    checkpoint = checkpoint or Checkpoint(Path(os.devnull), math.inf)
    first = checkpoint.resume(state)
    saved = time.monotonic()
    with _interruptible() as interrupted, progress(label, steps, first) as tick:
        for i in range(first, steps):
            figures: dict[str, Any] = dict(step(i))
            if not math.isfinite(figures["loss"]):
                raise Diverged(
                    f"{label}: the loss is {figures['loss']} at step {i}; "
                    "lower the stage's learning rate or use dtype float32"
                )
            tick(tokens=int(figures.pop("tokens", 0)), loss=figures["loss"])
            checkpoint.history.append({"step": i, **figures})
            stop = distributed.any_process(interrupted())
            if stop or distributed.any_process(time.monotonic() - saved >= checkpoint.seconds):
                if math.isfinite(checkpoint.seconds):
                    checkpoint.save(state, i + 1)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    return checkpoint.history
