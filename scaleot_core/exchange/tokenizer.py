"""Ship a tokenizer as plain files, and load one that the other party shipped."""

import hashlib
import tempfile
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path

from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from scaleot_core.common.errors import UserError, one_line, printable
from scaleot_core.common.files import read_json, write_json
from scaleot_core.exchange import untrusted
from scaleot_core.exchange.manifest import LARGEST_TOKENIZER, TOKENIZER_FILES, Entry
from scaleot_core.exchange.untrusted import check_hash
from scaleot_core.models.tokenizers import tokenizer_difference

TOKENIZER_SETTINGS = {
    "add_prefix_space",
    "additional_special_tokens",
    "backend",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "eos_token",
    "extra_special_tokens",
    "mask_token",
    "model_max_length",
    "pad_token",
    "padding_side",
    "split_special_tokens",
    "tokenizer_class",
    "unk_token",
}  # of a tokenizer_config.json: none names a file, code or a repository


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer so that `load_untrusted_tokenizer` takes it; UserError where that would load another one.

    Several chat templates go into its settings, since transformers would make a folder of them.
    """
    tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
    settings = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "TokenizersBackend"}
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if k in TOKENIZER_SETTINGS})
    if reason := _lost(folder, tokenizer):
        raise UserError(
            f"its tokenizer is more than its tokenizer.json says, so no package can keep it: {reason}; use another",
            parameter="model",
        )


def _lost(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say what of a tokenizer, saved in a folder, a package would lose; an empty text for nothing."""
    if not (folder / "tokenizer.json").is_file():
        return f"{type(tokenizer).__name__} writes none"
    for name in TOKENIZER_FILES:
        most = untrusted.LARGEST_JSON if name == "tokenizer_config.json" else LARGEST_TOKENIZER
        if (folder / name).is_file() and (folder / name).stat().st_size > most:
            return f"{name} has more than {most:,} bytes"
    return tokenizer_difference(tokenizer, load_untrusted_tokenizer(folder))


def check_shippable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError, before hours of work, if a package couldn't keep a model's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), tokenizer)


def load_listed_tokenizer(folder: Path, files: Mapping[str, Entry]) -> PreTrainedTokenizerBase:
    """Load a package's tokenizer from the very bytes that have the hashes which its manifest lists.

    UserError where a file has other content by now, and as `load_untrusted_tokenizer`.
    """
    with tempfile.TemporaryDirectory(prefix="scaleot-") as name:
        for file in sorted(files.keys() & set(TOKENIZER_FILES)):
            with (folder / file).open("rb") as stream:
                content = stream.read(files[file].bytes + 1)
            check_hash(folder / file, hashlib.sha256(content).hexdigest(), files[file].sha256)
            (Path(name) / file).write_bytes(content)
        try:
            return load_untrusted_tokenizer(Path(name))
        except UserError as error:
            raise UserError(error.message.replace(name, str(folder), 1)) from None


def load_untrusted_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a package's tokenizer from its tokenizer.json; UserError where it isn't sound or names anything else."""
    settings = untrusted.read_untrusted_json(folder / "tokenizer_config.json")
    if not isinstance(settings, dict) or settings.get("tokenizer_class") != "TokenizersBackend":
        raise UserError(f"{folder}/tokenizer_config.json: not that of a package's tokenizer; fetch it again")
    if foreign := sorted(settings.keys() - TOKENIZER_SETTINGS):
        raise UserError(f"{folder}/tokenizer_config.json: `{printable(foreign[0])}` has no place there; fetch it again")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: 'tokenizer.json' is missing; fetch it again")
    try:
        with chdir(folder):  # tokenizers can't open a path that the locale has no letters for
            return PreTrainedTokenizerFast.from_pretrained(".", local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a damaged file may end in a panic of the tokenizers library, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{folder}: the tokenizer can't be loaded ({one_line(error)}); fetch it again") from error
