"""Turn a conversation into the tokens that the model sees when it is used, of which the assistant's are learnt.

In use, `apply_chat_template` renders what was said so far, with the header of an answer, and the model goes on until
the end of its turn. So each answer is learnt behind exactly that rendering. As long as a template keeps what it
rendered before, and most do, all answers are learnt in one: the rendering of the whole conversation. A template that
rewrites earlier turns (Qwen3 leaves their thinking out, Mistral moves tools and system prompt to the last question)
has in the whole only what the model no longer sees; there each answer that it rewrites is an example of its own, up to
that answer. Where a template marks what the assistant generates, no more than that is learnt of an answer.
"""

from collections import Counter
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import printable
from scaleot_core.records.context import Context, Part
from scaleot_core.records.encoding import Encoded, encode_spans
from scaleot_core.records.forms import Chat, name_of
from scaleot_core.records.rendering import (
    Conversation,
    check_nothing_is_lost,
    ignored_fields,
    in_template,
    is_reworded,
)
from scaleot_core.records.tally import UNASKED


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, context: Context) -> list[Encoded]:
    """Encode a conversation in the model's own chat template, each answer behind what the model sees in use.

    The tokenizer is the model's `without_post_processor`: `apply_chat_template` makes no use of it either.
    Parts that don't fit into the context lose their oldest turns. ValueError where there is nothing to learn, and where
    the template leaves out what was said or can't be taken apart.
    """
    conversation = in_template(tokenizer, chat, context.now)
    learnt = [i for i, is_learnt in enumerate(chat.learnt) if is_learnt]
    answers = [i for i in learnt if i > 0]  # no one asks a model to speak first
    if not answers:
        raise ValueError(f"there is nothing in it to learn: {_why_nothing(chat)}")
    conversation = conversation.of(conversation.messages[: answers[-1] + 1])
    check_nothing_is_lost(conversation, answers)
    answered = _parts(conversation, answers)
    parts = [
        context.newest_turns(conversation.messages, part, lambda rest, left: _parts(conversation.of(rest), left)[-1])
        for part in answered
    ]
    tally = context.tally
    tally.answers_left_out += Counter({UNASKED: len(learnt) - len(answers)})
    tally.reworded += sum(is_reworded(conversation, i) for i in answers)
    tally.endless += any(not _has_end(conversation, *part) for part in answered)
    tally.ignored.update(f"messages: {printable(name)}" for name in ignored_fields(conversation))
    tally.switched_off += chat.switched_off
    return parts


def _why_nothing(chat: Chat) -> str:
    if not any(message["role"] == "assistant" for message in chat.messages):
        return "no message has the role `assistant`"
    return "nothing comes before what the assistant says" if any(chat.learnt) else "every answer is switched off"


def _parts(conversation: Conversation, answers: list[int]) -> list[Part]:
    """Return as few parts of a conversation as have every answer behind the rendering that the model sees in use."""
    groups: list[list[int]] = []
    for i in reversed(answers):  # a group's last answer comes first; its rendering has those of the others in it
        asked, answered = conversation.asked(i), conversation.answered(i)
        if not answered.startswith(asked):
            same = next((k for k, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(answered))
            lost = asked[same:][:40]
            raise ValueError(
                f"{name_of(i + 1, conversation.messages[i])}: the model's chat template doesn't keep what was said "
                f"before an answer as it is when the model is asked for it ({lost!r} goes); write it as `prompt` and "
                "`completion`"
            )
        if groups and conversation.answered(groups[-1][0]).startswith(answered):
            groups[-1].append(i)
        else:
            groups.append([i])
    parts = []
    for group in (group[::-1] for group in reversed(groups)):
        spans = [(len(conversation.asked(i)), len(conversation.answered(i))) for i in group]
        encoded = encode_spans(conversation.tokenizer, conversation.answered(group[-1]), spans)
        parts.append((group, _as_marked(conversation, group, encoded) if conversation.is_marked else encoded))
    return parts


def _as_marked(conversation: Conversation, group: list[int], encoded: Encoded) -> Encoded:
    """Return what of some answers the template marks; ValueError where it marks what no assistant says."""
    rendered = conversation.answered(group[-1])
    tokens, mask = conversation.of(conversation.messages[: group[-1] + 1]).encode()
    ends = [0]  # of what an assistant says; of what is rewritten later no one can tell where it stands
    others = []
    for i in range(1, group[-1] + 1):
        if conversation.messages[i]["role"] == "assistant":
            asked, answered = conversation.asked(i), conversation.answered(i)
            if rendered.startswith(asked) and ends[-1] < len(asked):
                others.append((ends[-1], len(asked)))
            ends.append(len(answered) if rendered.startswith(answered) else len(rendered))
        elif i == 1 and conversation.messages[0]["role"] == "assistant":
            ends.append(len(conversation.answered(0)))
    answers = {k for first, last in encoded.learnt for k in range(first, last)}
    between = encode_spans(conversation.tokenizer, rendered, others).learnt
    if any(mask[k] and k not in answers for first, last in between for k in range(first, last)):
        raise ValueError("the model's chat template marks as the assistant's what others say")
    for (first, last), i in zip(encoded.learnt, group, strict=True):
        start = next((k for k in range(first, last) if mask[k]), first)
        if str(conversation.tokenizer.decode(tokens[first:start])).strip():
            raise ValueError(
                f"{name_of(i + 1, conversation.messages[i])}: the model's chat template doesn't mark the beginning of "
                "what the model has to say"
            )
    marked = sorted(k for k in answers if mask[k])
    if not marked:
        raise ValueError("there is nothing in it to learn: the model's chat template marks nothing as the assistant's")
    runs = [[k for _, k in run] for _, run in groupby(enumerate(marked), lambda pair: pair[1] - pair[0])]
    return Encoded(tokens, [(run[0], run[-1] + 1) for run in runs])


def _has_end(conversation: Conversation, group: list[int], encoded: Encoded) -> bool:
    """Whether what is learnt of the last answer goes on after its words, with the end of its turn."""
    content = conversation.messages[group[-1]]["content"].strip()
    first, last = encoded.learnt[-1]
    return not content or not str(conversation.tokenizer.decode(encoded.tokens[first:last])).endswith(content)
