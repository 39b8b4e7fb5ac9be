"""Try tokenizers: whether one encodes soundly, and in what two differ, on text, special tokens and chats."""

import string
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError, one_line

PROBES = (
    "The 2nd «naïve» test,\n\tof 3.14 words: 你好!  <|x|>",
    " leading space",
    "trailing spaces  \n\n",
    "don't stop . at 100,000 or 🙂",
    "",
)
ASKED = [{"role": "user", "content": " What is 1+1? "}]
CHATS: tuple[list[dict[str, Any]], ...] = (
    [*ASKED, {"role": "assistant", "content": "It is two. "}],
    [{"role": "system", "content": "Be kind."}, *ASKED],
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
MOST_GROWTH, MOST_ADDED = 4, 16  # letters or tokens for each byte of a text, and around it
SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")  # not padding_side: `collate` pads


def check_encoding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Raise UserError where a tokenizer fails on a text, makes it grow beyond reason, or goes beyond a vocabulary.

    A normalizer may still make grow what no probe has in it.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    for text in (*string.printable, *PROBES):
        most = MOST_GROWTH * len(text.encode()) + MOST_ADDED
        try:
            size = len(normalizer.normalize_str(text)) if normalizer else 0
            tokens = list(tokenizer(text)["input_ids"]) if size <= most else []
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise UserError(f"its tokenizer can't encode {text!r} ({one_line(error)}); use another") from error
        if (size := max(size, len(tokens))) > most:
            raise UserError(f"its tokenizer makes {size:,} letters or tokens of {text!r}; use another")
        if max(tokens, default=0) >= vocabulary:
            raise UserError(
                f"its tokenizer makes token {max(tokens)} of {text!r}, and the model's embedding has {vocabulary}; "
                "use another"
            )


def tokenizer_difference(one: PreTrainedTokenizerBase, two: PreTrainedTokenizerBase) -> str:
    """Say in what a tokenizer differs from another one, `two`; an empty text where in nothing.

    Compared are the vocabulary, the special tokens, what becomes of some texts, with and without what the tokenizer
    adds to them, and what each chat template makes of some conversations.
    """
    if one.get_vocab() != two.get_vocab():
        return f"it would have {len(two)} tokens, not {len(one)}, or others"
    for name in SETTINGS:
        if getattr(one, name) != getattr(two, name):
            return f"its {name} would be {getattr(two, name)!r}, not {getattr(one, name)!r}"
    for what, action in _actions(one):
        if _outcome(action, one) != _outcome(action, two):
            return what
    return ""


Action = Callable[[PreTrainedTokenizerBase], Any]


def _actions(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Action]]:
    """Yield what is done with both tokenizers, each with what it means if the outcomes differ."""
    added = list(dict.fromkeys([*map(str, tokenizer.all_special_tokens), *tokenizer.get_added_vocab()]))[:256]
    for text in (*PROBES, " ".join(added), "".join(f"a{token} b" for token in added)):
        shown = repr(text if len(text) <= 60 else f"{text[:60]}…")
        tokens = _encode(tokenizer, text=text, special=True)
        for flag in (True, False):
            yield f"it would make other tokens of {shown}", partial(_encode, text=text, special=flag)
            yield f"it would decode {shown} otherwise", partial(_decode, tokens=tokens, skip=flag)
    templates = tokenizer.chat_template
    yield "its chat templates would be others", lambda other: other.chat_template
    names = list(templates) if isinstance(templates, dict) else [None] if templates else []
    for name, chat, tools in product(names, CHATS, (None, TOOLS)):
        shown_name = "" if name is None else f" {name!r}"
        yield (
            f"its chat template{shown_name} would render otherwise",
            partial(_render, name=name, chat=chat, tools=tools),
        )


def _encode(tokenizer: PreTrainedTokenizerBase, *, text: str, special: bool) -> Any:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _decode(tokenizer: PreTrainedTokenizerBase, *, tokens: list[int], skip: bool) -> Any:
    return tokenizer.decode(tokens, skip_special_tokens=skip)


def _render(tokenizer: PreTrainedTokenizerBase, *, name: str | None, chat: list[Any], tools: list[Any] | None) -> Any:
    asking = chat[-1]["role"] == "user"
    return tokenizer.apply_chat_template(
        chat, tools=tools, chat_template=name, tokenize=False, add_generation_prompt=asking
    )


def _outcome(action: Action, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return what an action gives, or how it fails, as a template does that takes no system prompt."""
    try:
        return action(tokenizer)
    except Exception as error:  # a chat template has its own types
        return f"{type(error).__name__}: {one_line(error)}"
