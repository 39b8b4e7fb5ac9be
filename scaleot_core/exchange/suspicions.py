"""What in a package looks like a trap for records: silent channels, rows and columns of zeros, layers that do nothing.

A warning, no proof. A maker who knows this probe can build channels that fire a little on everything. With ReLU many
channels are silent by nature (Voita et al. 2023, arXiv 2309.04827): there a trap of most of a layer alone stands out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.compression.plan import DECODER_KINDS, Plan, layers_of
from scaleot_core.compression.quantization import QuantizedMatrix
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.models.forward import hidden_of, hooks, last_hidden_state

SENTENCES = (
    "The committee will meet on Tuesday, 14 March, to discuss next year's budget and the new building.",
    "def mean(values): return sum(values) / len(values)  # of an empty list: ZeroDivisionError",
    "Wasser kocht bei 100 Grad; le train part à huit heures; el perro duerme en la cocina.",
    "Q: Who wrote it? A: My sister did, when she was nine - and she'd never seen the sea!",
)
BLOCKS = (12, 32)  # of tokens: each sentence, filled up with random ones, and blocks of random ones alone
SILENT = 1e-6  # of what a layer's loudest channel reaches at most
MOST_SILENT = 0.75  # of a layer's channels, with ReLU
ACTIVATIONS = ("activation_function", "hidden_act", "hidden_activation", "activation")  # as configurations name them


def most_silent(config: PretrainedConfig) -> float:
    """Return the share of silent channels that a layer of an honest model may have: none where no activation is 0."""
    return MOST_SILENT if "relu" in {getattr(config, name, None) for name in ACTIVATIONS} else 0.0


@contextmanager
def _fast(model: PreTrainedModel) -> Iterator[None]:
    """Compute in float32 for the length of a block on a CPU, which is many times slower with 16 bits."""
    dtype, parameters = model.dtype, list(model.parameters())
    if model.device.type != "cpu" or any(isinstance(p.data, QuantizedMatrix) for p in parameters):
        parameters = []
    for parameter in parameters:  # and no buffer, which may have more digits than `dtype`
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)


def random_tokens(config: PretrainedConfig, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Draw tokens, none of which pads: transformers would warn of a mask that is missing."""
    tokens, padding = torch.randint(config.vocab_size, shape, generator=draw), config.pad_token_id
    return tokens if padding is None else torch.where(tokens == padding, (padding + 1) % config.vocab_size, tokens)


@torch.no_grad()
def suspicions(model: PreTrainedModel, plan: Plan, sentences: Sequence[list[int]], draw: int) -> list[str]:
    """List what is suspicious in an emulator's decoder layers, a line for each.

    `sentences` are the tokens of `SENTENCES`; `draw` seeds random ones. A draw that the package's maker could foresee
    would let channels fire on it alone.
    """
    layers = {i: decoder_layers(model)[i] for i in layers_of(plan, *DECODER_KINDS)}
    peaks: dict[int, Tensor] = {}
    changes: dict[int, float] = {}

    def watch_channels(i: int):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            peaks[i] = args[0].abs().flatten(0, -2).amax(0)

        return hook

    def watch_layer(i: int):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
            changes[i] = float((hidden_of(out) - args[0]).norm() / args[0].norm())

        return hook

    handles = [layer.register_forward_hook(watch_layer(i)) for i, layer in layers.items()]
    down = family(model.config).feed_forward_out
    handles += [x.get_submodule(down).register_forward_pre_hook(watch_channels(i)) for i, x in layers.items()]
    blocks = random_tokens(model.config, BLOCKS, torch.Generator().manual_seed(draw))
    for block, sentence in zip(blocks, sentences, strict=False):
        tokens = torch.tensor(sentence[: BLOCKS[1]])
        block[: len(tokens)] = tokens
    with hooks(*handles), _fast(model):
        last_hidden_state(model, blocks)
    lines = []
    for i, layer in layers.items():
        silent = int((peaks[i] <= SILENT * peaks[i].max()).sum())
        if silent > most_silent(model.config) * len(peaks[i]):
            lines.append(f"layer {i}: {silent} of {len(peaks[i])} feed-forward channels are silent on ordinary text")
        for name, weight in layer.named_parameters():
            if weight.ndim != 2 or isinstance(weight.data, QuantizedMatrix):
                continue
            if zero := sum(int((weight.abs().amax(dim) == 0).sum()) for dim in (0, 1)):
                lines.append(f"layer {i}: {name} has {zero} rows or columns of zeros")
        if not changes[i] > SILENT:
            lines.append(f"layer {i}: it changes nothing")
    return lines
