"""What may be wrong with the folder of a model."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from scaleot_core.common.tensors import read_tensors

WEIGHTS = "model.safetensors"


def without_folder(folder: Path) -> None:
    """Lose a model's folder."""
    shutil.rmtree(folder)


def without_weights(folder: Path) -> None:
    """Lose a model's weights."""
    (folder / WEIGHTS).unlink()


def with_noise(folder: Path) -> None:
    """Put bytes in the place of a model's weights that are no weights."""
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 4)


def cut_short(folder: Path) -> None:
    """Lose the end of a model's weights."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def without_a_tensor(folder: Path) -> None:
    """Lose one tensor, which transformers would fill with random numbers."""
    tensors = read_tensors(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


DAMAGES = [without_folder, without_weights, with_noise, cut_short, without_a_tensor]
