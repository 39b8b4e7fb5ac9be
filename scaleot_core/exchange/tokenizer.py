"""Ship a tokenizer as plain files, and load one that the other party shipped."""

from pathlib import Path

from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from scaleot_core.common.errors import UserError, one_line, printable
from scaleot_core.common.files import read_json, write_json
from scaleot_core.exchange import untrusted

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
    "tokenizer_class",
    "unk_token",
}  # of a tokenizer_config.json: none names a file, code or a repository
PROBE = "The 2nd «naïve» test,\n\tof 3.14 words: 你好!  <|x|>"  # on which a tokenizer must be what it was


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer so that `load_tokenizer` takes it; UserError where it would not be what it was."""
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "TokenizersBackend"}
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if k in TOKENIZER_SETTINGS})
    again = load_untrusted_tokenizer(folder)
    if again(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"] or again.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            "the model's tokenizer is more than its tokenizer.json says, so it can't be shipped; use another"
        )


def load_untrusted_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a package, from its tokenizer.json; UserError where it isn't sound or asks for more."""
    settings = untrusted.read_untrusted_json(folder / "tokenizer_config.json")
    if not isinstance(settings, dict) or settings.get("tokenizer_class") != "TokenizersBackend":
        raise UserError(f"{folder}/tokenizer_config.json: not that of a package's tokenizer; fetch it again")
    if foreign := sorted(settings.keys() - TOKENIZER_SETTINGS):
        raise UserError(f"{folder}/tokenizer_config.json: `{printable(foreign[0])}` has no place there; fetch it again")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: 'tokenizer.json' is missing; fetch it again")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a damaged file may end in a panic of the tokenizers library, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{folder}: the tokenizer can't be loaded ({one_line(error)}); fetch it again") from error
