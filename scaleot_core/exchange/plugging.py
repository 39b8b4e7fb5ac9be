"""Write the plug-in model: the real model's files, with the tensors that the adapter changes replaced."""

import shutil
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from scaleot_core.common.progress import byte_progress
from scaleot_core.common.tensors import copy_tensors
from scaleot_core.models.opened import ModelSource
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.tuning.adapters import TunedAdapter


def write_plugged(folder: Path, source: ModelSource, model: StreamedModel, adapter: TunedAdapter) -> None:
    """Write a model with an adapter plugged in, in transformers' format, into an existing, empty folder.

    `model` is the source's; `adapter` has its shapes. One tensor at a time is in memory, and what the adapter doesn't
    change is copied byte by byte: other tensors, and every file beside the weights.
    """
    names = {model.places[name][:2]: name for name in adapter.changes}

    def plugged(file: Path, stored: str) -> Tensor | None:
        name = names.get((file, stored), "")
        base = model.read_stored(name)
        return None if base is None else adapter.plugged(name, base)

    with byte_progress("writing the plug-in", sum(file.stat().st_size for file in source.files)) as moved:
        for file in source.files:
            copy_tensors(file, folder / file.name, partial(plugged, file), moved)
    index = source.files[0].with_name(SAFE_WEIGHTS_INDEX_NAME)
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        shutil.copyfile(index, folder / index.name)
    for file in source.beside:
        target = folder / file.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
