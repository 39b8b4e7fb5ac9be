"""Covariances of the inputs of each layer's matrices on the corpus, kept for later runs of the same code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from scaleot_core.common.files import fingerprint
from scaleot_core.common.tensors import read_tensors, tensor_hash, write_tensors
from scaleot_core.compression.svd import input_covariances
from scaleot_core.methods.base import ModelOwner
from scaleot_core.models.streaming import StreamedModel

Covariances = Callable[[int], dict[str, Tensor]]
"""A layer's index to its covariances, by the names of its matrices in the model."""


def covariances(owner: ModelOwner, streamed: StreamedModel, *, channels: bool) -> Covariances:
    """Compute each layer's input covariances on `rank_compression.calibration_blocks` of the corpus.

    Those of the attention projections, and with `channels` of the down-projection too. They are kept in one file a
    layer; a covariance that several projections share is stored once, under all their names.
    """
    blocks = owner.blocks[: owner.params.rank_compression.calibration_blocks]
    key = fingerprint(owner.folder, owner.runtime.device.type, str(owner.runtime.dtype), tensor_hash(blocks), channels)

    def file(i: int) -> Path:
        return owner.scratch / f"inputs-{key}" / f"{i}.safetensors"

    @contextmanager
    def around(i: int, layer: nn.Module) -> Iterator[None]:
        with input_covariances(streamed.model.config, i, layer, channels=channels) as sums:
            yield
        shared: dict[int, list[str]] = {}
        for name, total in sums.items():
            shared.setdefault(id(total), []).append(name)
        means = {",".join(names): (sums[names[0]] / blocks.numel()).float() for names in shared.values()}
        write_tensors(file(i), means)

    if not all(file(i).exists() for i in range(streamed.model.config.num_hidden_layers)):
        streamed.run(blocks, around)
    return lambda i: {name: mean for names, mean in read_tensors(file(i)).items() for name in names.split(",")}
