"""Open the real model, wherever it lies, to be read tensor by tensor: its weights stay on disk."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from scaleot_core.common.tensors import SAFETENSORS_DTYPES
from scaleot_core.models.loading import (
    DESCRIPTIONS,
    describing,
    description_folder,
    read_description,
    read_model,
    weight_files,
)
from scaleot_core.models.streaming import StreamedModel

CPU = torch.device("cpu")
WEIGHTS_INDEX = ".index.json"


@dataclass(frozen=True)
class ModelSource:
    """A model in safetensors files that have all of its tensors, each under its own name."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    files: list[Path]
    folder: Path
    """Where its configuration lies."""

    @property
    def beside(self) -> list[Path]:
        """What lies in its folder beside weights: configurations, the tokenizer, chat templates, README and licence."""
        files = [file for pattern in DESCRIPTIONS for file in self.folder.glob(pattern) if file.is_file()]
        return sorted(file for file in set(files) if not file.name.endswith(WEIGHTS_INDEX))

    def streamed(self) -> StreamedModel:
        """Open it to be read in one dtype: the narrowest that any of its tensors has."""
        dtype = min(self._dtypes() or {torch.float32}, key=lambda dtype: dtype.itemsize)
        return StreamedModel(self.files[0].parent, self.config, device=CPU, dtype=dtype, files=self.files)

    def _dtypes(self) -> set[torch.dtype]:
        dtypes = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items() if dtype.is_floating_point}
        names = set()
        for file in self.files:
            with safe_open(file, framework="pt") as stream:
                names |= {stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
        return {dtypes[name] for name in names if name in dtypes}


@contextmanager
def open_model(source: str, scratch: Path) -> Iterator[ModelSource]:
    """Open a model on the hub or in a local folder for the length of a block; UserError where it can't be read.

    One that isn't in safetensors files, or whose tensors have other names there than its own, is loaded whole, once,
    and written to a temporary folder in `scratch`.
    """
    config, tokenizer = read_description(source)
    opened = ModelSource(config, tokenizer, weight_files(source), description_folder(source))
    with describing(source):
        is_whole = bool(opened.files) and opened.streamed().is_whole
    if is_whole:
        yield opened
        return
    with tempfile.TemporaryDirectory(prefix=".model.", dir=scratch) as folder:
        read_model(source)[0].save_pretrained(folder, save_original_format=False)  # tensors are named as in the model
        yield ModelSource(config, tokenizer, weight_files(folder), opened.folder)
