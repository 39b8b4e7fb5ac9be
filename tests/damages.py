"""What may be wrong with the folder of a model, a package or an adapter."""

import shutil
from collections.abc import Callable
from pathlib import Path

from helpers import list_again
from safetensors.torch import save_file
from torch import Tensor

from scaleot_core.common.tensors import read_tensors, write_tensors

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


# --- of a file of a package or an adapter ----------------------------------------------------------------


def flip(name: str, at: float = 0.5) -> Callable[[Path], None]:
    """Flip a bit of a file, at this share of its length."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * at)] ^= 4
        (folder / name).write_bytes(content)

    return damage


def holds(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Put other tensors into a file, and list it with its new hash."""

    def damage(folder: Path) -> None:
        write_tensors(folder / name, change({key: t.clone() for key, t in read_tensors(folder / name).items()}))
        list_again(folder, name)

    return damage
