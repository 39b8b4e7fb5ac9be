"""Turn a conversation into the tokens that the model sees when it is used, of which the assistant's are learnt.

In use, `apply_chat_template` renders what was said so far, with the header of an answer, and the model goes on until
the end of its turn. So each answer is learnt behind exactly that rendering. As long as a template keeps what it
rendered before, and most do, all answers are learnt in one: the rendering of the whole conversation. A template that
rewrites earlier turns (Qwen3 leaves their thinking out, Mistral moves tools and system prompt to the last question)
has in the whole only what the model no longer sees; there each answer that it rewrites is an example of its own, up to
that answer. Where a template marks what the assistant generates, transformers' own mask says what is learnt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from scaleot_core.records.encoding import Encoded, encode_spans
from scaleot_core.records.forms import CALLS, Chat, name_of
from scaleot_core.records.rendering import (
    Conversation,
    check_nothing_is_lost,
    ignored_fields,
    in_template,
    is_reworded,
    loses,
)


@dataclass(frozen=True)
class EncodedChat:
    """What is learnt of a conversation, and what of it isn't."""

    parts: list[Encoded]
    tokens_cut: int
    """Tokens of turns that were left out, since they don't fit into the context."""
    answers_cut: int
    """Answers in those turns."""
    unasked: int
    """Answers that nothing comes before."""
    unsaid: int
    """Answers of which the chat template leaves out that they call tools."""
    reworded: int
    """Answers that the chat template renders otherwise than word for word."""
    ignored: list[str]
    """Fields of messages that the chat template doesn't read."""


@dataclass(frozen=True)
class Part:
    """A conversation up to an answer, and which of its messages are learnt in it."""

    conversation: Conversation
    answers: list[int]
    encoded: Encoded


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, context_length: int) -> EncodedChat:
    """Encode a conversation in the model's own chat template, each answer behind what the model sees in use.

    The tokenizer is the model's `without_post_processor`: `apply_chat_template` makes no use of it either.
    Parts that don't fit into the context lose their oldest turns, but for a system prompt. ValueError where there is
    nothing to learn, and where the template leaves out what was said or can't be taken apart.
    """
    whole = in_template(tokenizer, chat)
    given = [i for i, learnt in enumerate(chat.learnt) if learnt]
    asked = [i for i in given if i > 0 or whole.is_marked]  # no one asks a model to speak first
    answers = [i for i in asked if not loses(whole, i, CALLS)]
    if not answers:
        why = "the model's chat template leaves out what it calls" if asked else _why_nothing(chat)
        raise ValueError(f"there is nothing in it to learn: {why}")
    whole = whole.of(whole.messages[: answers[-1] + 1])
    check_nothing_is_lost(whole, answers)
    parts = list(_parts(whole, answers))
    fitting = [_shorten(part, context_length) for part in parts]
    return EncodedChat(
        [part.encoded for part in fitting],
        sum(len(a.encoded.tokens) - len(b.encoded.tokens) for a, b in zip(parts, fitting, strict=True)),
        sum(len(a.answers) - len(b.answers) for a, b in zip(parts, fitting, strict=True)),
        len(given) - len(asked),
        len(asked) - len(answers),
        sum(is_reworded(whole, i) for i in answers),
        ignored_fields(whole),
    )


def _why_nothing(chat: Chat) -> str:
    if not any(message["role"] == "assistant" for message in chat.messages):
        return "no message has the role `assistant`"
    return "nothing comes before what the assistant says" if any(chat.learnt) else "every answer is switched off"


def _parts(whole: Conversation, answers: list[int]) -> Iterator[Part]:
    """Yield as few parts of a conversation as have every answer behind the rendering that the model sees in use."""
    if whole.is_marked:
        yield Part(whole, answers, _encode_marked(whole, answers))
        return
    groups: list[list[int]] = []
    for i in reversed(answers):  # a group's last answer comes first; its rendering has those of the others in it
        asked, answered = whole.asked(i), whole.answered(i)
        if not answered.startswith(asked):
            same = next((k for k, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(answered))
            lost = asked[same:][:40]
            raise ValueError(
                f"{name_of(i + 1, whole.messages[i])}: the model's chat template doesn't keep what was said before an "
                f"answer as it is when the model is asked for it ({lost!r} goes); write it as `prompt` and `completion`"
            )
        if groups and whole.answered(groups[-1][0]).startswith(whole.answered(i)):
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in reversed(groups):
        spans = [(len(whole.asked(i)), len(whole.answered(i))) for i in reversed(group)]
        encoded = encode_spans(whole.tokenizer, whole.answered(group[0]), spans)
        yield Part(whole.of(whole.messages[: group[0] + 1]), group[::-1], encoded)


def _encode_marked(whole: Conversation, answers: list[int]) -> Encoded:
    """Encode a conversation by the template's own marks, less the messages that aren't to be learnt."""
    tokens, mask = whole.encode()
    for i, message in enumerate(whole.messages):
        if message["role"] == "assistant" and i not in answers:
            rendered, before = whole.answered(len(whole.messages) - 1), whole.answered(i - 1) if i else ""
            if not rendered.startswith(whole.answered(i)) or not whole.answered(i).startswith(before):
                raise ValueError(
                    f"{name_of(i + 1, message)} isn't to be learnt, but the model's chat template renders it otherwise "
                    "once more is said; leave the record out"
                )
            spans = [(len(before), len(whole.answered(i)))]
            for first, last in encode_spans(whole.tokenizer, rendered, spans).learnt:
                mask[first:last] = [0] * (last - first)
    learnt, position = [], 0
    for is_learnt, run in groupby(mask):
        length = len(list(run))
        learnt += [(position, position + length)] if is_learnt else []
        position += length
    if not learnt:
        raise ValueError("there is nothing in it to learn: the model's chat template marks nothing as the assistant's")
    return Encoded(tokens, learnt)


def _shorten(part: Part, context_length: int) -> Part:
    """Leave the oldest turns out until the rest fits, but for a system prompt; the last question stays in any case.

    A turn begins with a question of the user. What is left is rendered anew, as the model would see it.
    """
    messages = part.conversation.messages
    head = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    shorter = part
    for first, message in enumerate(messages[: part.answers[-1]]):
        if len(shorter.encoded.tokens) <= context_length + 1:  # the last token is a target alone
            break
        if message["role"] == "user" and first > head:
            rest = part.conversation.of(messages[:head] + messages[first:])
            answers = [i - (first - head) for i in part.answers if i >= first]
            *_, shorter = _parts(rest, answers)
    return shorter
