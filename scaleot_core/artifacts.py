"""Where the pipeline's artifacts lie, and how those that are read as data are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scaleot_core.common.files import read_jsonl
from scaleot_core.common.tensors import read_tensors


@dataclass(frozen=True)
class Artifacts:
    """The paths of all artifacts below `root`, which dvc.yaml names too."""

    root: Path = Path("artifacts")

    @property
    def model(self) -> Path:
        """The real model: a transformers folder."""
        return self.root / "model"

    @property
    def tasks(self) -> Path:
        """Each task's training and evaluation questions."""
        return self.root / "tasks"

    @property
    def corpus(self) -> Path:
        """Training and held-out blocks of the public corpus."""
        return self.root / "corpus"

    @property
    def importance(self) -> Path:
        """Prior scores and locally fitted harmonizers."""
        return self.root / "importance"

    @property
    def harmonizers(self) -> Path:
        """Final scores and harmonizers."""
        return self.root / "harmonizers"

    @property
    def emulator(self) -> Path:
        """The emulator package."""
        return self.root / "emulator"

    @property
    def emulator_private(self) -> Path:
        """What led to the package, which stays with the model owner."""
        return self.root / "emulator.private.json"

    def blocks(self, part: str) -> Tensor:
        """Read the blocks (N, T) of a part of the corpus: `train` or `heldout`."""
        return read_tensors(self.corpus / f"{part}.safetensors")["blocks"]

    def questions(self, task: str, part: str) -> list[dict[str, Any]]:
        """Read a task's questions: part `train` or `eval`."""
        return read_jsonl(self.tasks / task / f"{part}.jsonl")

    def adapter(self, task: str, kind: str) -> Path:
        """What offsite tuning made of a task: adapters of one kind, and how their tuning went."""
        return self.root / "adapters" / task / kind

    def zero_shot(self, task: str) -> Path:
        """The untuned model's figures on a task."""
        return self.root / "baselines" / f"zero_shot-{task}.json"

    def full_finetune(self, task: str) -> Path:
        """The fully fine-tuned model's figures on a task, and how its tuning went."""
        return self.root / "baselines" / f"full_finetune-{task}"
