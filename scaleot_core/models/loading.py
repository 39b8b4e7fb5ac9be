"""Load models, configurations and tokenizers, from a local folder or the hub, safely."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import read_json
from scaleot_core.common.tensors import SAFETENSORS_DTYPES
from scaleot_core.models.families import family
from scaleot_core.models.tokenizers import tokenizer_difference

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
    """Read a model and its tokenizer from the hub or a local folder, in any of transformers' formats.

    The model is in `dtype`, or, without one, each tensor in its own. `revision` is a commit, tag or branch on the hub,
    empty for the newest. UserError for a model that can't be fetched or read, is of an unsupported architecture, or has
    another's tokenizer.
    """
    path = Path(source).expanduser()
    try:
        _check_place(source, path)
        name, at = str(path) if path.exists() else source, revision or "main"
        config = AutoConfig.from_pretrained(name, revision=at, trust_remote_code=False)
        family(config)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=at, trust_remote_code=False)
        check_tokenizer(tokenizer, config)
        model = _pretrained(name, config=config, dtype=dtype or "auto", revision=at)
        if dtype is None:  # transformers has loaded all in one
            _restore_dtypes(
                model, path if path.exists() else Path(str(cached_file(name, CONFIG_NAME, revision=at))).parent
            )
        return model, tokenizer
    except UserError as error:
        raise UserError(error.message, parameter="model", value=source) from error
    except Exception as error:
        where = "" if path.exists() else "no such folder is here, and from the hub "
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
    elif (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        try:
            import sentencepiece  # noqa: F401
        except ImportError:
            raise UserError(
                "its tokenizer.model is SentencePiece's: pip install sentencepiece protobuf, or put its tokenizer.json "
                "there"
            ) from None


@torch.no_grad()
def _restore_dtypes(model: PreTrainedModel, folder: Path) -> None:
    """Give each tensor of a model the dtype and the digits that it has in the model's safetensors files.

    What transformers has put together otherwise than it lies there stays as it was loaded.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {SAFE_WEIGHTS_NAME}
    parameters = dict(model.named_parameters())
    for file in (folder / name for name in sorted(names) if (folder / name).is_file()):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                here = parameters.get(name, parameters.get(f"{model.base_model_prefix}.{name}"))
                if here is None or stream.get_slice(name).get_dtype() == SAFETENSORS_DTYPES.get(here.dtype):
                    continue
                tensor = stream.get_tensor(name)
                if tensor.is_floating_point() and torch.equal(tensor.to(here.dtype), here):
                    here.data = tensor


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer as `read_model` gave them, in a folder of transformers' format.

    The configuration keeps the dtype in which transformers loads the model; its own `save_pretrained` would put that
    of the first tensor there.
    """
    dtype = model.config.dtype
    model.save_pretrained(folder)
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one_dtype(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Compute in one dtype for the length of a block where a model's tensors are of several: in the narrowest."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    return torch.autocast(model.device.type, dtype=narrowest, enabled=len(dtypes) > 1)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise UserError if a tokenizer has tokens that the model has no embedding of."""
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if tokens > config.vocab_size:
        raise UserError(
            f"its tokenizer has {tokens} tokens and the model's embedding {config.vocab_size}, so it "
            "belongs to another model; put the right one there"
        )


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
