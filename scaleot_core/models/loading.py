"""Load models, configurations and tokenizers, from a local folder or the hub, safely."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.models.families import family

logging.disable_progress_bar()


def _pretrained(source: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model with all of its weights; ValueError where transformers would draw a missing tensor at random."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, trust_remote_code=False, **options
    )
    model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        raise ValueError(f"tensor {min(missing)!r} is missing")
    return model


def read_config(folder: Path) -> PretrainedConfig:
    """Read the configuration in a transformers folder; UserError for none, or an unsupported architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each library below has its own type
        raise UserError(f"{folder}: no model configuration can be read there ({one_line(error)})") from error
    family(config)
    return config


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model in a transformers folder, frozen and in evaluation mode.

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


def read_model(
    source: str, dtype: torch.dtype | None = None, revision: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from the hub or a local folder, in any of transformers' formats.

    The model is in `dtype`, or, without one, in its own.

    `revision` is a commit, tag or branch on the hub, empty for the newest.
    UserError for a model that can't be fetched or read, is of an unsupported architecture, or has another's tokenizer.
    """
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().exists():
        raise UserError("no such folder; correct the path", parameter="model", value=source)
    try:
        at = revision or "main"
        config = AutoConfig.from_pretrained(source, revision=at, trust_remote_code=False)
        family(config)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=at, trust_remote_code=False)
        check_tokenizer(tokenizer, config)
        return _pretrained(source, config=config, dtype=dtype or "auto", revision=at), tokenizer
    except UserError as error:
        raise UserError(error.message, parameter="model", value=source) from error
    except Exception as error:
        raise UserError(f"it can't be loaded ({one_line(error)})", parameter="model", value=source) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise UserError if a tokenizer has tokens that the model has no embedding of."""
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if tokens > config.vocab_size:
        raise UserError(
            f"its tokenizer has {tokens} tokens and the model's embedding {config.vocab_size}, so it "
            "belongs to another model; put the right one there"
        )


def save_model(source: str, folder: Path, dtype: torch.dtype, revision: str = "") -> None:
    """Copy a model and its tokenizer, as `read_model` gives them, into `folder` as safetensors of one dtype."""
    model, tokenizer = read_model(source, dtype, revision)
    model.save_pretrained(folder, save_original_format=False)  # tensors are named as in the model
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a transformers folder; UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer can't be loaded ({one_line(error)}); fetch it again") from error
