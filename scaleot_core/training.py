"""A training loop that stops where it should, resumes to the same bytes, and refuses to go on with a NaN.

Every random draw of a step is a function of the seed and the step's number (`runtime.generator`), so a checkpoint
holds tensors and a step count, and no generator state. It lies in an undeclared scratch folder: a DVC output that
persists would make a run with other parameters resume this one's state.
"""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scaleot_core import parallel
from scaleot_core.errors import UserError
from scaleot_core.files import read_json, read_tensors, whole_folder, write_json, write_tensors
from scaleot_core.progress import progress, say


class Diverged(UserError):
    """A loss that is not finite."""


class State(Protocol):
    """What a loop trains: it can be written to a checkpoint and read back."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...


class Optimizer:
    """AdamW on float32 masters of parameters that may compute in a lower precision.

    A parameter already in float32 is its own master. Parameters without a gradient are left as they are, moments
    included, which is what DLR needs: only harmonizers that took part move.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float = 0.0, clip: float = 1.0) -> None:
        if not parameters:
            raise ValueError("no parameter to train: name at least one")
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.clip = clip
        groups = [{"params": group} for group in parallel.by_split(self.masters.values())]
        self.adamw = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    def step(self, lr: float) -> None:
        """One update from the gradients at hand, clipped by their common norm; then they are dropped."""
        self.gather()
        parallel.sum_gradients(self.masters.values())
        parallel.clip_gradients(self.masters.values(), self.clip)
        self.update(self.adamw, lr)

    def gather(self) -> None:
        """Move the parameters' gradients to their masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None

    def update(self, rule: torch.optim.Optimizer, lr: float) -> None:
        """One update of the masters by `rule`, AdamW or what wraps it; then gradients are dropped."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        rule.step()
        rule.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name."""
        state = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                state[f"{key}/{name}"] = value
        return state

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take `tensors()` back."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(parallel.placed(tensors[f"master/{name}"], master))
                self.parameters[name].copy_(master)
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
                for key in keys:
                    value = tensors[f"{key}/{name}"]
                    self.adamw.state[master][key] = (
                        value.to(master.device) if key == "step" else parallel.placed(value, master)
                    )


def warmup_then_linear(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: up over the first `warmup` share of the steps, then down to zero."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise + 1)


@dataclass
class Checkpoint:
    """Where and how often a loop saves itself; with `seconds` at 0, after every step. `folder` is the loop's own."""

    folder: Path
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)
    ours: bool = False
    """Whether this run wrote what is there, and so doesn't resume another."""

    def resume(self, state: State) -> int:
        """Load the last checkpoint into `state` and `history`; return the number of finished steps, 0 without one."""
        saves = sorted(self.folder.glob("steps/[0-9]*"))
        if not saves:
            return 0
        try:
            state.load(read_tensors(saves[-1] / "state.safetensors"))
            saved = read_json(saves[-1] / "progress.json")
        except UserError as error:
            raise UserError(f"{error}; or delete {self.folder} to begin the stage anew") from error
        self.history = saved["history"]
        if not self.ours:
            say(f"resuming after step {saved['step']}")
        return int(saved["step"])

    def save(self, state: State, step: int) -> None:
        """Write the checkpoint of `step` finished steps, whole or not at all; only then drop what was there before."""
        self.ours, new = True, self.folder / "steps" / f"{step:09d}"
        with whole_folder(new) as folder:
            write_tensors(folder / "state.safetensors", state.tensors())
            write_json(folder / "progress.json", {"step": step, "history": self.history})
        if parallel.is_first():
            for old in new.parent.iterdir():
                if old != new:
                    shutil.rmtree(old, ignore_errors=True)
        parallel.wait()

    def within(self, name: str) -> "Checkpoint":
        """A checkpoint for a smaller loop that is part of the same work, removed with this one."""
        return Checkpoint(self.folder / name, self.seconds)

    def remove(self) -> None:
        """Forget the checkpoint, once the stage's outputs stand."""
        parallel.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def scratch(key: str) -> Path:
    """Scratch folder of one stage and one set of inputs, in the main repository also during `dvc exp run --temp`."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scaleot" / "scratch" / key


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
            stop = parallel.anywhere(interrupted())
            if stop or parallel.anywhere(time.monotonic() - saved >= checkpoint.seconds):
                if math.isfinite(checkpoint.seconds):
                    checkpoint.save(state, i + 1)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    return checkpoint.history
