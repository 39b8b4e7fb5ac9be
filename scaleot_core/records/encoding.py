"""Turn texts into the tokens that a model sees when it is used, and say which of them are learnt.

Tokenizers differ in what they put around a text (a BOS, an EOS, a space) and in how they join words, so nothing here
glues tokens of pieces together without looking: each text is encoded whole, as `tokenizer(text)` does it in use.
"""

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LEADS = ("\n", ".", "a")  # what a text may be encoded behind, to see it as the continuation of another


@dataclass(frozen=True)
class Encoded:
    """Tokens, and which stretches of them are learnt."""

    tokens: list[int]
    learnt: list[tuple[int, int]]
    """First token of each stretch, and the one after its last; in order, apart from each other."""

    @property
    def answer_length(self) -> int:
        """Count the tokens of the last stretch."""
        first, last = self.learnt[-1]
        return last - first


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Encode a text that is learnt as a whole, with one end-of-text token, also where it brings its own."""
    text = _without_end(tokenizer, text)
    tokens, _ = _encode(tokenizer, text)
    if not tokens or not text.strip():
        raise ValueError("there is nothing in it to learn")
    return Encoded([*tokens, _end(tokenizer)], [(0, len(tokens) + 1)])


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """Encode a prompt and the completion that is learnt, which ends in one end-of-text token.

    The prompt has the tokens that it has alone, since these are what the model gets in use. Where the whole text would
    join its last one with the completion's first ("the cap" and "ital", or a prompt that ends in a space), the
    completion is encoded apart. An empty prompt is the token that a text begins with, as lm-eval scores it. ValueError
    where the completion has no token of its own.
    """
    completion = _without_end(tokenizer, completion)
    before, _ = _encode(tokenizer, prompt)
    tokens, ends = _encode(tokenizer, prompt + completion)
    if not before:
        before = [_start(tokenizer)]
        tokens = tokens if tokens[:1] == before else before + tokens
    answer = tokens[len(before) :]
    if tokens[: len(before)] != before:
        answer = _continuation(tokenizer, completion)
        if _decode(tokenizer, before + answer) != _decode(tokenizer, tokens):
            # a tokenizer that can't say it so: the token in which both have a part is learnt
            first = bisect_right(ends, len(prompt))
            before, answer = tokens[:first] or [_start(tokenizer)], tokens[first:]
    if not answer or not completion.strip():
        raise ValueError("there is nothing in it to learn")
    return Encoded([*before, *answer, _end(tokenizer)], [(len(before), len(before) + len(answer) + 1)])


def encode_spans(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
    """Encode a text that has its special tokens in it, such as a conversation; spans of its characters are learnt.

    A token that is partly in a span is learnt, as in transformers' own masks of the assistant's tokens. The tokenizer
    is one `without_post_processor`.
    """
    tokens, starts, ends = _offsets(tokenizer, text)
    learnt = [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]
    return Encoded(tokens, [(first, last) for first, last in learnt if first < last])


def without_post_processor(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Copy a tokenizer, less what it does to the tokens of a text at the end.

    Beside putting special tokens around a text, which a rendered conversation has itself, post-processors take spaces
    off the offsets of tokens. Then no token is at the space that an answer may begin with, and transformers' mask of
    the assistant's tokens ends there.
    """
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return bare


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """Encode a text as it stands; say where each token begins and ends, in characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = zip(*encoded["offset_mapping"], strict=True) if encoded["input_ids"] else ((), ())
    return list(encoded["input_ids"]), list(starts), list(ends)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Encode a text with what the tokenizer puts in front of it, but not behind it; say where each token ends.

    What it puts behind, such as an EOS, belongs behind an answer alone. A text that has its BOS already, as a rendered
    conversation has, gets no second one.
    """
    has_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    encoded = tokenizer(
        text or "a",  # so that what stands in front is told from what stands behind
        add_special_tokens=not has_bos,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    added = encoded["special_tokens_mask"]
    first = added.index(0) if 0 in added else len(added)
    count = first if not text else len(added) - (added[::-1].index(0) if 0 in added else 0)
    return list(encoded["input_ids"])[:count], [end for _, end in encoded["offset_mapping"]][:count]


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text as it goes on from another: without the space or BOS that many tokenizers begin a text with."""
    for lead in LEADS:
        tokens, starts, ends = _offsets(tokenizer, lead + text)
        first = bisect_right(ends, len(lead))
        if first < len(tokens) and starts[first] >= len(lead):
            return tokens[first:]
    return []


def _without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Take the end-of-text token off a text that brings its own, and the blanks behind it."""
    end = str(tokenizer.eos_token)
    while (shorter := text.rstrip()).endswith(end):
        text = shorter.removesuffix(end)
    return text


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    assert tokenizer.eos_token_id is not None
    return int(tokenizer.eos_token_id)


def _start(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else _end(tokenizer)
