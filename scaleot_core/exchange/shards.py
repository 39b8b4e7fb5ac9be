"""The files that a package's tensors lie in: one for each part, or shards of bounded size for a part of gigabytes.

Which tensor lies in which file follows from their names and shapes, which follow from the manifest's plan. So there is
no index to trust.
"""

import math
import re

import torch

from scaleot_core.common.tensors import Shapes
from scaleot_core.compression.emulator import PARTS

SHARD_BYTES = 2 * 10**9  # at most in a shard; a larger tensor has one for itself
TENSOR_FILE = re.compile(rf"({'|'.join(PARTS)})(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors")


def part_files(part: str, expected: Shapes) -> dict[str, Shapes]:
    """Divide a part's tensors, sorted by name, into files of at most `SHARD_BYTES`, by the file's name."""
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    room = SHARD_BYTES
    for name in sorted(expected):
        shape, dtype = expected[name]
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = expected[name]
        room -= size
    if len(shards) == 1:
        return {f"{part}.safetensors": expected}
    return {f"{part}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}
