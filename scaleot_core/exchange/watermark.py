"""A keyed mark in the matrices of a package that aren't the model's own, and whose package a leak was made from.

A spread-spectrum mark (Cox et al. 1997; in weights DeepMarks, Chen et al. 2019): each weight goes up or down by a two-
hundredth of its row's root mean square, by signs that only who has the recipient's key can draw. A leak is compared
with the package as it was before it was marked, after its hidden states, feed-forward channels and low-rank factors
were turned back into the package's. Of an innocent recipient the signs are independent of all that is compared, so that
Hoeffding's inequality bounds the chance of an accusation, whatever was done to the leak.
"""

import hashlib
import hmac
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.exchange.int8 import SCALES
from scaleot_core.exchange.ledger import ExactWeights, model_tensor
from scaleot_core.models.families import family

STRENGTH = 0.005  # of a row's root mean square; rounding to int8 changes weights by twice as much
FALSE_ACCUSATION = 1e-6  # chance that any of the recipients who are compared is named wrongly
LARGEST = 4.0  # root mean squares of a row, beyond which a difference counts no more


def recipient_key(secret: str, recipient: str) -> bytes:
    """Derive a recipient's key from a secret in hex."""
    return hmac.digest(bytes.fromhex(secret), recipient.encode(), "sha256")


def threshold(recipients: int) -> float:
    """Return the least score at which one of so many recipients is named, by Hoeffding's inequality."""
    return math.sqrt(2 * math.log(recipients / FALSE_ACCUSATION))


def can_be_marked(name: str, tensor: Tensor, exact: ExactWeights) -> bool:
    """Tell whether a package's tensor is a matrix of which nothing is the model's own, and no right factor."""
    return tensor.ndim == 2 and not name.endswith(".right") and model_tensor(name)[0] not in exact.tensors


def signs(key: bytes, name: str, shape: Sequence[int]) -> Tensor:
    """Draw the signs of a tensor's mark, -1 and 1, by its name."""
    size = math.prod(shape)
    drawn = hashlib.shake_256(hmac.digest(key, name.encode(), "sha256")).digest(-(-size // 8))
    bits = np.unpackbits(np.frombuffer(drawn, dtype=np.uint8), count=size)
    return torch.from_numpy(bits).float().mul_(2).sub_(1).view(*shape)


def _row_sizes(matrix: Tensor) -> Tensor:
    """Return the root mean square of each row (rows, 1)."""
    return matrix.square().mean(1, keepdim=True).sqrt()


def marked(
    tensors: Iterable[tuple[str, Tensor]], key: bytes, exact: ExactWeights, names: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a package's tensors with the mark, and put into `names` those that have it."""
    for name, tensor in tensors:
        if can_be_marked(name, tensor, exact):
            names.append(name)
            full = tensor.float()
            tensor = (full + STRENGTH * _row_sizes(full) * signs(key, name, full.shape)).to(tensor.dtype)
        yield name, tensor


class Weights:
    """The tensors in a folder's safetensors files, read one at a time in float32; UserError where there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, dict[str, Path]()
        self.turn: Callable[[str, Tensor], Tensor] = lambda name, matrix: matrix
        """Applied to what is read."""
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as stream:
                    self.files |= dict.fromkeys(stream.keys(), file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: it can't be read ({one_line(error)}); fetch it again") from None
        if not self.files:
            raise UserError(f"{folder}: no safetensors are there; name a package or a transformers folder")

    def get(self, name: str) -> Tensor | None:
        """Read a matrix (out, in), of int8 multiplied out; None where there is none of that name."""
        if name not in self.files:
            return None
        with safe_open(self.files[name], framework="pt") as stream:
            matrix = stream.get_tensor(name).float()
        scales = self.get(f"{name}{SCALES}")
        matrix = matrix if scales is None else matrix * scales
        return self.turn(name, matrix.nan_to_num(0, 0, 0)) if matrix.ndim == 2 else None

    def product(self, stem: str) -> Tensor | None:
        """Read a projection that may be two factors, multiplied out."""
        left, right = self.get(f"{stem}.left"), self.get(f"{stem}.right")
        return self.get(f"{stem}.weight") if left is None or right is None else left @ right


def scores(
    leak: Weights, unmarked: Weights, config: PretrainedConfig, names: Iterable[str], keys: Sequence[bytes]
) -> list[float]:
    """Score how much of each key's mark is in a leak: about a standard normal number for whom it has nothing of."""
    _turn_back(leak, unmarked, config)
    products, total = [0.0] * len(keys), 0.0
    for name in names:
        before, after = unmarked.get(name), _in_order(leak, unmarked, config, name)
        if before is None or after is None or after.shape != before.shape:
            continue
        overlap = float((after * before).sum())
        change = after * (float(before.square().sum()) / overlap if overlap else 1.0) - before  # of the same scale
        change = (change / _row_sizes(change).clamp_min(1e-30)).clamp_(-LARGEST, LARGEST)
        total += float(change.square().sum())
        for k, key in enumerate(keys):
            products[k] += float((change * signs(key, name, change.shape)).sum())
    return [product / math.sqrt(total) if total else 0.0 for product in products]


def _turn_back(leak: Weights, unmarked: Weights, config: PretrainedConfig) -> None:
    """Let a leak whose hidden states were rotated or permuted be read as if they weren't: its embeddings tell how."""
    names, size = family(config), config.hidden_size
    pairs = list[tuple[Tensor, Tensor]]()
    for name in unmarked.files:
        before, after = (None, None) if name.startswith(f"{names.layers}.") else (unmarked.get(name), leak.get(name))
        if before is not None and after is not None and before.shape == after.shape and before.shape[1] == size:
            pairs.append((before, after))
    if not pairs:
        return
    before, after = max(pairs, key=lambda pair: len(pair[0]))
    left, _, right = torch.linalg.svd(before.T @ after)  # orthogonal Procrustes (Schönemann 1966)
    rotation = left @ right
    if float(rotation.trace()) > 0.9 * size:  # training moves embeddings a little
        return
    written = (f".{names.feed_forward_out}", f".{names.attention}.{list(names.projections)[-1]}")

    def turn(name: str, matrix: Tensor) -> Tensor:
        stem, _, kind = name.rpartition(".")
        if not name.startswith(f"{names.layers}."):
            return matrix
        if stem.endswith(written):
            return rotation @ matrix if kind != "right" and len(matrix) == size else matrix
        return matrix @ rotation.T if kind != "left" and matrix.shape[1] == size else matrix

    leak.turn = turn


def _in_order(leak: Weights, unmarked: Weights, config: PretrainedConfig, name: str) -> Tensor | None:
    """Read a leak's matrix as the package would have it.

    Of two factors the left one, as it has to be beside the package's right one; of a down-projection the channels in
    the package's order and scale, which the rows of the in-matrices tell.
    """
    names, (stem, _, kind) = family(config), name.rpartition(".")
    if kind == "left":
        whole, right = leak.product(stem), unmarked.get(f"{stem}.right")
        fits = whole is not None and right is not None and whole.shape[1] == right.shape[1]
        return whole @ torch.linalg.pinv(right) if fits else None
    matrix = leak.get(name)
    if matrix is None or not stem.endswith(f".{names.feed_forward_out}"):
        return matrix
    order, layer = None, stem.removesuffix(names.feed_forward_out)
    for into, fused in names.feed_forward_in.items():
        pair = (source.get(f"{layer}{into}.weight") for source in (leak, unmarked))
        leaked, shipped = (None if rows is None else rows.tensor_split(fused) for rows in pair)
        if not leaked or not shipped or len(leaked[0]) != matrix.shape[1]:
            return matrix
        if order is None:  # the nearest row by its direction
            near = torch.nn.functional.normalize(shipped[0]) @ torch.nn.functional.normalize(leaked[0]).T
            order = near.argmax(1)
            matrix = matrix[:, order]
        for ours, theirs in zip(shipped, leaked, strict=True):
            matrix = matrix * ((theirs[order] * ours).sum(1) / ours.square().sum(1).clamp_min(1e-30))
    return matrix


def named(recipients: Mapping[str, float]) -> list[str]:
    """List whose mark is beyond chance in a leak, the clearest first; empty where that can't be told."""
    least = threshold(len(recipients))
    return sorted((name for name, score in recipients.items() if score >= least), key=lambda name: -recipients[name])
