"""Draw random numbers by name: each draw is a function of the seed and its names alone."""

import hashlib

import torch


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for one named draw, so that a resumed run draws what the uninterrupted one would have."""
    text = ":".join(str(part) for part in (seed, *names))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
