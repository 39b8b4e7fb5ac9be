"""Singular value decompositions for Selective Rank Compression, each made once for a whole sweep over β (section 4).

Plain, or whitened by the covariance of a projection's inputs, as SVD-LLM does (Wang et al., ICLR 2025): plain
truncation is nearest to the matrix, whitened truncation is nearest in what the matrix gives out on real text.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from scaleot_core.common.files import fingerprint
from scaleot_core.common.tensors import read_tensors, tensor_hash, write_tensors
from scaleot_core.models.families import attention, family, feed_forward_name, projection_name
from scaleot_core.models.forward import hooks

DAMPING = 1e-4  # of the mean input variance, added to each direction: a covariance of few tokens is singular

Factors = tuple[Tensor, Tensor]
Decompose = Callable[[str, int, Tensor], Factors]
"""A projection's name in the model, the number of one of its fused matrices, and that matrix, to its factors."""


def decompose(weight: Tensor, covariance: Tensor | None = None) -> Factors:
    """Factor a matrix (out, in) into left (out, k) and right (k, in), k = min(out, in), in float32.

    Their first r columns and rows are the best approximation of rank r: of W in Frobenius norm (Eckart-Young), or with
    a `covariance` C (in, in) of W · C^½, so of the outputs. The error then is the tail of the singular values of W, or
    of W · S for C = S · Sᵀ. The singular values are split evenly between the factors.
    """
    weight = weight.double()
    outputs = weight @ weight.T if covariance is None else weight @ damped(covariance) @ weight.T
    values, vectors = torch.linalg.eigh(outputs)  # ascending; 1.6 times as fast as an SVD, at its error
    rank = min(weight.shape)
    s, u = values.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
    root = s.clamp(min=max(s[0].item() * 1e-12, torch.finfo(s.dtype).tiny)).sqrt()  # none to divide by is zero
    return (u * root).float(), (u.T @ weight / root[:, None]).float()


def svd_factors(name: str, part: int, weight: Tensor) -> Factors:
    """Decompose the matrix alone, without a covariance."""
    return decompose(weight)


def empty_factors(name: str, part: int, weight: Tensor) -> Factors:
    """Make factors without values, to give a model its shapes before a package's tensors are read."""
    rank = min(weight.shape)
    return weight.new_empty(weight.shape[0], rank), weight.new_empty(rank, weight.shape[1])


def damped(covariance: Tensor) -> Tensor:
    """Scale a covariance (in, in), in float64, to mean variance 1, and make it positive definite."""
    covariance = covariance.double()
    scaled = covariance / covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return scaled + DAMPING * torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)


@contextmanager
def input_covariances(
    config: PretrainedConfig, index: int, layer: nn.Module, *, channels: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Sum x · xᵀ (in, in) of the inputs of a decoder layer's projections over all tokens that pass in the block.

    In float64, by the projection's name in the model: over the number of tokens they are the uncentred covariances.
    Projections that read the same input share one tensor. With `channels` that of the feed-forward channels is there
    too, by the name of the matrix that takes them.
    """
    sums: dict[str, Tensor] = {}
    latest: list[object] = [None, ""]  # the last input, and the first projection that read it

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if latest[0] is args[0]:
                sums[name] = sums[str(latest[1])]
                return
            x = args[0].flatten(0, -2).float()
            product = (x.T @ x).double()
            sums[name] = sums[name].add_(product) if name in sums else product
            latest[:] = [args[0], name]

        return hook

    block = attention(config, layer)
    read = {projection_name(config, index, name): block.get_submodule(name) for name in family(config).projections}
    if channels:
        read[feed_forward_name(config, index)] = layer.get_submodule(family(config).feed_forward_out)
    with hooks(*(module.register_forward_pre_hook(accumulate(name)) for name, module in read.items())):
        yield sums


def cached_factors(folder: Path, covariances: Mapping[str, Tensor] | None = None) -> Decompose:
    """Make a `decompose` that caches its factors in `folder`, by the content of the matrix and of its covariance."""

    def factors(name: str, part: int, weight: Tensor) -> Factors:
        covariance = None if covariances is None else covariances[name]
        inputs = "plain" if covariance is None else tensor_hash(covariance)
        file = folder / f"{fingerprint('eigh', tensor_hash(weight), list(weight.shape), inputs)}.safetensors"
        if not file.exists():
            left, right = decompose(weight, None if covariance is None else covariance.to(weight.device))
            write_tensors(file, {"left": left, "right": right})
        stored = read_tensors(file)
        return stored["left"].to(weight.device), stored["right"].to(weight.device)

    return factors
