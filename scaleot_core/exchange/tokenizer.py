"""Ship a tokenizer as plain files, and load one that the other party shipped."""

import tempfile
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
PROBES = ("The 2nd «naïve» test,\n\tof 3.14 words: 你好!  <|x|>", " leading space", "")


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer so that `load_untrusted_tokenizer` takes it; UserError where it would not be what it was.

    Several chat templates go into its settings, since transformers would make a folder of them.
    """
    tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
    settings = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "TokenizersBackend"}
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if k in TOKENIZER_SETTINGS})
    if different := _difference(tokenizer, load_untrusted_tokenizer(folder)):
        raise UserError(
            f"the model's tokenizer is more than its tokenizer.json says ({different}), so no package can keep it"
        )


def check_shippable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a package couldn't keep the tokenizer that a model has: told before hours of work."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), tokenizer)


def _difference(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> str:
    """Say in what a shipped tokenizer differs from the model's own; an empty text where in nothing."""
    specials = " ".join(dict.fromkeys(map(str, before.all_special_tokens)))
    for probe in (*PROBES, f"{specials} between {specials}"):
        if after(probe)["input_ids"] != before(probe)["input_ids"]:
            return f"of {probe!r} it makes other tokens"
        plain = before(probe, add_special_tokens=False)["input_ids"]
        if after.decode(plain) != before.decode(plain):
            return f"it decodes the tokens of {probe!r} otherwise"
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        if getattr(after, name) != getattr(before, name):
            return f"its {name} is {getattr(after, name)}, not {getattr(before, name)}"
    return "" if after.chat_template == before.chat_template else "its chat template is another"


def load_untrusted_tokenizer(folder: Path, *, links: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a package, from its tokenizer.json; UserError where it isn't sound or asks for more."""
    settings = untrusted.read_untrusted_json(folder / "tokenizer_config.json", links=links)
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
