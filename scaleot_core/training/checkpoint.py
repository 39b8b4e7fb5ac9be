"""Save a loop's state in a scratch folder, and resume from it to the same bytes."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from scaleot_core.common import distributed
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_folder, read_json, write_json
from scaleot_core.common.progress import say
from scaleot_core.common.tensors import read_tensors, write_tensors


class State(Protocol):
    """What a loop trains: it can be written to a checkpoint and read back."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...


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
        with atomic_folder(new) as folder:
            write_tensors(folder / "state.safetensors", state.tensors())
            write_json(folder / "progress.json", {"step": step, "history": self.history})
        if distributed.is_main_process():
            for old in new.parent.iterdir():
                if old != new:
                    shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()

    def within(self, name: str) -> "Checkpoint":
        """Make a checkpoint for a loop inside this one's work, removed with this one."""
        return Checkpoint(self.folder / name, self.seconds)

    def remove(self) -> None:
        """Delete the checkpoint, once the stage's outputs are written."""
        distributed.barrier()
        shutil.rmtree(self.folder, ignore_errors=True)


def scratch_dir(key: str) -> Path:
    """Return the scratch folder of one stage and set of inputs, in the main repository also in `dvc exp run --temp`."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scaleot" / "scratch" / key
