"""Run a plug-in as it was written, before anyone else does: finite, not much worse on public text, the same by PEFT."""

import math
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError
from scaleot_core.common.random import generator
from scaleot_core.data.corpus import read_text
from scaleot_core.exchange.suspicions import random_tokens
from scaleot_core.models.families import context_length, decoder_layers, family
from scaleot_core.models.forward import last_hidden_state, logits_of, swapped_layers
from scaleot_core.models.opened import CPU, ModelSource
from scaleot_core.models.streaming import StreamedLayer, StreamedModel
from scaleot_core.tuning.adapters import TunedLora, plugged_in

BLOCKS = (4, 64)  # of random tokens, where there is no public text
PUBLIC_BLOCKS = (8, 512)  # of public text at most
SAME, ROUNDING = 0.01, 1e-4  # of the largest change of a logit, and of the largest logit


def trial_blocks(public: Path | None, source: ModelSource) -> Tensor:
    """Return the blocks (N, T) to try a model on: of public text, or of random tokens where no file is named.

    UserError for a file without text for one block.
    """
    length = context_length(source.config)
    if public is None:
        count, size = BLOCKS
        return random_tokens(source.config, (count, min(size, length)), generator(0, "trial"))
    if not public.exists():
        raise UserError(f"{public}: no such file; name one with public text")
    count, size = PUBLIC_BLOCKS[0], min(PUBLIC_BLOCKS[1], length)
    tokens = _first_tokens(public, source.tokenizer, count * size)
    if len(tokens) < size:
        raise UserError(f"{public}: it has {len(tokens)} tokens of text, and {size} are needed; name a longer one")
    count = len(tokens) // size
    return torch.tensor(tokens[: count * size]).view(count, size)


def _first_tokens(public: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    tokens: list[int] = []
    for passage in read_text(str(public)):
        tokens += tokenizer(f"{passage}\n\n", add_special_tokens=False)["input_ids"]
        if len(tokens) >= count:
            break
    return tokens[:count]


@torch.no_grad()
def trial_loss(source: ModelSource, files: list[Path], blocks: Tensor) -> float:
    """Compute the mean next-token loss (nats) of blocks (N, T), in float32, of a model in safetensors files.

    `source` is the real model, which has its configuration; one decoder layer is in memory. UserError for a loss that
    isn't finite.
    """
    model = StreamedModel(files[0].parent, source.config, device=CPU, dtype=torch.float32, files=files)
    in_tuple = family(source.config).in_tuple
    layers = {
        i: StreamedLayer(partial(model.layer, i), nullcontext, len(blocks), last=False, in_tuple=in_tuple)
        for i in range(len(decoder_layers(model.model)))
    }
    with model.without_layers() as shell, swapped_layers(shell, layers):
        hidden = last_hidden_state(shell, blocks)
        losses = [_loss(logits_of(shell, states), block) for states, block in zip(hidden, blocks, strict=True)]
    return _finite(float(torch.stack(losses).mean()))


@torch.no_grad()
def trial_lora(source: ModelSource, folder: Path, tuned: TunedLora, blocks: Tensor) -> float:
    """Compute the same loss of the model with a PEFT adapter, as PEFT loads it from a folder.

    `tuned` is what was written there. The model is in memory whole, in float32. UserError for logits that aren't
    finite, or aren't those of the plug-in.
    """
    files = source.files
    model = StreamedModel(files[0].parent, source.config, device=CPU, dtype=torch.float32, files=files).load()
    before = model(input_ids=blocks, use_cache=False).logits
    with plugged_in(model, (), tuned):
        plugged = model(input_ids=blocks, use_cache=False).logits
    loss = _finite(float(torch.stack([_loss(*pair) for pair in zip(plugged, blocks, strict=True)]).mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of a name that transformers has changed
        loaded = PeftModel.from_pretrained(model, folder)(input_ids=blocks, use_cache=False).logits
    most = SAME * (plugged - before).abs().max() + ROUNDING * plugged.abs().max()
    if not (loaded - plugged).abs().max() <= most:
        raise UserError(f"{folder}: loaded by PEFT it doesn't give the plug-in's logits; use --out instead")
    return loss


def _loss(logits: Tensor, block: Tensor) -> Tensor:
    """Compute the mean loss of the tokens (T,) that follow; logits are (T, V)."""
    return cross_entropy(logits[:-1].float(), block[1:].long())


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise UserError(f"the plug-in's loss is {loss}; the adapter is of no use, ask for another")
    return loss
