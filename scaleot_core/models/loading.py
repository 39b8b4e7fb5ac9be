"""Load models, configurations and tokenizers, from a local folder or the hub, safely."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import read_json
from scaleot_core.models.families import family
from scaleot_core.models.tokenizers import check_encoding, tokenizer_difference

logging.disable_progress_bar()

DESCRIPTIONS = (
    *("*.json", "*.jinja", "*.md", "*.model", "*.py", "*.tiktoken", "*.txt"),
    *("LICENCE*", "LICENSE*", "NOTICE*", "README*", "additional_chat_templates/*.jinja"),
)
"""Patterns of the files in a model's folder that are none of weights; those of weights' indexes among them."""


def _pretrained(source: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model with all of its weights; ValueError where transformers would draw a missing tensor at random."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, trust_remote_code=False, **options
    )
    model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        raise ValueError(f"tensor {min(missing)!r} is missing")
    return model


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None, *, buffers_too: bool) -> PreTrainedModel:
    """Build a model of shapes without weights, by default in its configuration's dtype, and draw none on the way.

    Buffers are computed, unless they too are to take no memory.
    """
    with init_empty_weights(include_buffers=buffers_too), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    model.tie_weights()
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


def read_description(source: str, revision: str = "") -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Read a model's configuration and tokenizer from the hub or a local folder, without its weights.

    `revision` is a commit, tag or branch on the hub, empty for the newest. UserError for what can't be fetched or read,
    is of an unsupported architecture, or has another's tokenizer.
    """
    with describing(source):
        _check_place(source, Path(source).expanduser())
        name, at = _place(source), revision or "main"
        config = AutoConfig.from_pretrained(name, revision=at, trust_remote_code=False)
        family(config)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=at, trust_remote_code=False)
        check_tokenizer(tokenizer, config)
        return config, tokenizer


def read_model(
    source: str, dtype: torch.dtype | None = None, revision: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a model and its tokenizer as `read_description` does, in any of transformers' formats.

    The model is in `dtype`, or, without one, in that of its configuration.
    """
    config, tokenizer = read_description(source, revision)
    with describing(source):
        model = _pretrained(_place(source), config=config, dtype=dtype or "auto", revision=revision or "main")
        return model, tokenizer


def weight_files(source: str) -> list[Path]:
    """Find a model's safetensors files, as transformers looks for them, and fetch those on the hub.

    Empty where it has weights of other formats alone.
    """
    with describing(source):
        name, find = _place(source), partial(cached_file, _raise_exceptions_for_missing_entries=False)
        if single := find(name, SAFE_WEIGHTS_NAME):
            return [Path(single)]
        index = find(name, SAFE_WEIGHTS_INDEX_NAME)
        files = sorted(set(read_json(Path(index))["weight_map"].values())) if index else []
        return [Path(str(cached_file(name, file))) for file in files]


def description_folder(source: str) -> Path:
    """Give the folder of a model's configuration, with all that describes it there; that of the hub is fetched."""
    with describing(source):
        if (path := Path(_place(source))).is_dir():
            return path
        return Path(snapshot_download(source, allow_patterns=[*DESCRIPTIONS], ignore_patterns=["*/*", "*.index.json"]))


def _place(source: str) -> str:
    """Give a source as transformers takes it: the path of a folder, or a name on the hub."""
    path = Path(source).expanduser()
    return str(path) if path.exists() else source


@contextmanager
def describing(source: str) -> Iterator[None]:
    """Turn whatever keeps a model from being read into a UserError of parameter `model`."""
    try:
        yield
    except UserError as error:
        raise UserError(error.message, parameter="model", value=source) from error
    except Exception as error:
        where = "" if Path(source).expanduser().exists() else "no such folder is here, and from the hub "
        raise UserError(f"{where}it can't be loaded ({one_line(error)})", parameter="model", value=source) from error


def _check_place(source: str, path: Path) -> None:
    """Raise UserError if a source is, or is meant as, a path where no model that can be read lies."""
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError("no such folder; correct the path")
    elif not path.is_dir():
        raise UserError("that is a file; name the folder of a transformers model")
    elif not (path / CONFIG_NAME).is_file():
        raise UserError(f"no {CONFIG_NAME} is in that folder, so it is no transformers model; correct the path")
    elif missing := _missing_index(path):
        raise UserError(f"{missing} is missing, which says what is in which of its files of weights; fetch it again")
    elif (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        try:
            import sentencepiece  # noqa: F401
        except ImportError:
            raise UserError(
                "its tokenizer.model is SentencePiece's: pip install sentencepiece protobuf, or put its tokenizer.json "
                "there"
            ) from None


def _missing_index(folder: Path) -> str:
    """Name the index that a folder lacks whose weights lie in several files; empty where its weights can be found."""
    indexes = {SAFE_WEIGHTS_NAME: SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME: WEIGHTS_INDEX_NAME}
    if any((folder / name).is_file() for name in (*indexes, *indexes.values())):
        return ""
    shards = {name: name.replace(".", "-*-of-*.", 1) for name in indexes}
    return next((index for name, index in indexes.items() if any(folder.glob(shards[name]))), "")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise UserError if a tokenizer has tokens that the model has no embedding of, or can't encode a text soundly."""
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if tokens > config.vocab_size:
        raise UserError(
            f"its tokenizer has {tokens} tokens and the model's embedding {config.vocab_size}, so it "
            "belongs to another model; put the right one there"
        )
    check_encoding(tokenizer, config.vocab_size)


def save_model(source: str, folder: Path, dtype: torch.dtype, revision: str = "") -> None:
    """Copy a model and its tokenizer, as `read_model` gives them, into `folder` as safetensors of one dtype.

    UserError also for a tokenizer that would not be in the folder what it is in the source.
    """
    model, tokenizer = read_model(source, dtype, revision)
    model.save_pretrained(folder, save_original_format=False)  # tensors are named as in the model
    tokenizer.save_pretrained(folder)
    if different := tokenizer_difference(tokenizer, load_tokenizer(folder)):
        raise UserError(f"its tokenizer can't be copied: {different}; use another", parameter="model", value=source)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a transformers folder; UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer can't be loaded ({one_line(error)}); fetch it again") from error
