"""Loading a model and its tokenizer from a local folder, and what the stages ask of every model."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from scaleot_core.errors import UserError, one_line
from scaleot_core.families import decoder_layers, family

logging.disable_progress_bar()


def _pretrained(source: str | Path, **options: Any) -> PreTrainedModel:
    """A model with all of its weights; ValueError where transformers would draw a missing tensor at random."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, trust_remote_code=False, **options
    )
    model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        raise ValueError(f"tensor {min(missing)!r} is missing")
    return model


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in a transformers folder; UserError for none, or an unsupported architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each library below has its own type
        raise UserError(f"{folder}: no model configuration can be read there ({one_line(error)})") from error
    family(config)
    return config


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in a transformers folder, frozen and in evaluation mode.

    Safetensors only, and no code from the folder is run. UserError for a missing folder, missing weights, a damaged
    file or an unsupported architecture.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model is there (config.json is missing); run `dvc repro` or correct `model`")
    try:
        config = read_config(folder)
        model = _pretrained(folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # each library below has its own type for a damaged or missing file
        raise UserError(f"{folder}: the model can't be loaded ({one_line(error)}); fetch it again") from error
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def read_model(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in one dtype and its tokenizer, from the hub or a local folder, in any of transformers' formats.

    UserError for a model that can't be fetched or read, is of an unsupported architecture, or has another's tokenizer.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        family(config)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        check_tokenizer(tokenizer, config)
        return _pretrained(source, config=config, dtype=dtype), tokenizer
    except UserError as error:
        raise UserError(f"model = {source!r}: {error}") from error
    except Exception as error:
        raise UserError(f"model = {source!r}: it can't be loaded ({one_line(error)})") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """UserError where a tokenizer has tokens that the model has no embedding of."""
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if tokens > config.vocab_size:
        raise UserError(
            f"its tokenizer has {tokens} tokens and the model's embedding {config.vocab_size}, so it "
            "belongs to another model; put the right one there"
        )


def save_model(source: str, folder: Path, dtype: torch.dtype) -> None:
    """Copy a model and its tokenizer, as `read_model` gives them, into `folder` as safetensors of one dtype."""
    try:
        model, tokenizer = read_model(source, dtype)
    except UserError as error:
        raise UserError(f"params.yaml: {error}") from error
    model.save_pretrained(folder, save_original_format=False)  # tensors are named as in the model
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a transformers folder; UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer can't be loaded ({one_line(error)}); fetch it again") from error


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Hooks that are registered for the length of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(model: PreTrainedModel, stand_ins: Mapping[int, nn.Module]) -> Iterator[None]:
    """Put stand-ins in the place of some decoder layers, by index, for the length of a block."""
    layers = decoder_layers(model)
    originals = {i: layers[i] for i in stand_ins}
    try:
        for i, stand_in in stand_ins.items():
            layers[i] = stand_in
        yield
    finally:
        for i, original in originals.items():
            layers[i] = original


def run_stack(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """The last hidden states (B, T, D) of blocks (B, T), without the head and without a key-value cache."""
    output: Tensor = model.base_model(input_ids=blocks.to(model.device).long(), use_cache=False).last_hidden_state
    return output


def block_loss(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Mean next-token cross-entropy (nats) of blocks (B, T), without a key-value cache."""
    blocks = blocks.to(model.device).long()
    logits = model(input_ids=blocks, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: PreTrainedModel, blocks: Tensor, batch_blocks: int = 8) -> float:
    """Mean next-token cross-entropy (nats) over blocks (N, T); its exponential is the perplexity."""
    total = 0.0
    for batch in blocks.split(batch_blocks):
        total += block_loss(model, batch).item() * len(batch)
    if not math.isfinite(total):
        raise UserError(f"the model's loss on the corpus is {total}; check its weights, or use dtype float32")
    return total / len(blocks)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, blocks: Tensor, batch_blocks: int = 8) -> list[Tensor]:
    """Inputs of all decoder layers and the output of the last: L + 1 tensors (N·T, D) in the model's dtype.

    Read by hooks, since `output_hidden_states` knows only a family's own layers. The model's head is not run.
    """
    layers = decoder_layers(model)
    kept: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def keep_input(i: int):  # type: ignore[no-untyped-def]
        return lambda module, args: kept[i].append(args[0].flatten(0, 1))

    hooks = [layer.register_forward_pre_hook(keep_input(i)) for i, layer in enumerate(layers)]
    hooks.append(layers[-1].register_forward_hook(lambda module, args, out: kept[-1].append(out.flatten(0, 1))))
    with hooked(*hooks):
        for batch in blocks.split(batch_blocks):
            run_stack(model, batch)
    return [torch.cat(parts) for parts in kept]


def check_layers(name: str, count: int, layers: int, *, least: int, most: int) -> None:
    """UserError where a parameter asks for fewer or more layers than a model of `layers` can give."""
    if not least <= count <= most:
        raise UserError(
            f"params.yaml: {name} = {count}: the model has {layers} decoder layers; the range is {least} to {most}"
        )
