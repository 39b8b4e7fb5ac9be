"""Whatever differs between two tokenizers is found."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizer_kinds import KINDS, STABLE
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scaleot_core.models.tokenizers import tokenizer_difference

CHANGES: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "eos_token would be None, not '</s>'": lambda t: setattr(t, "eos_token", None),
    "tokens, not": lambda t: t.add_tokens(["<more>"]),
    "make other tokens": lambda t: setattr(t.backend_tokenizer, "post_processor", None),
    "other tokens of": lambda t: setattr(
        t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "otherwise": lambda t: setattr(t.backend_tokenizer, "decoder", decoders.Fuse()),
    "chat templates would be others": lambda t: setattr(t, "chat_template", None),
    "model_max_length": lambda t: setattr(t, "model_max_length", 7),
}


@pytest.mark.parametrize("said", CHANGES)
def test_difference_is_told(said: str) -> None:
    one, two = KINDS["bos"](), KINDS["bos"]()
    one.chat_template = two.chat_template = STABLE["chatml"]
    assert tokenizer_difference(one, two) == ""
    CHANGES[said](two)
    assert said in tokenizer_difference(one, two)
