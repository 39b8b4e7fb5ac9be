"""Turn a conversation into the tokens that the model sees when it is used, of which the assistant's are learnt.

In use, `apply_chat_template` renders what was said so far, with the header of an answer, and the model goes on until
the end of its turn. So each answer is learnt behind exactly that rendering. As long as a template keeps what it
rendered before, and most do, all answers are learnt in one: the rendering of the whole conversation. A template that
rewrites earlier turns (Qwen3 leaves their thinking out, Mistral moves tools and system prompt to the last question)
has in the whole only what the model no longer sees; there each answer that it rewrites is an example of its own, up to
that answer. Where a template marks what the assistant generates, transformers' own mask says what is learnt.
"""

from collections import Counter
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import printable
from scaleot_core.records.context import Context, Part
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
from scaleot_core.records.tally import UNASKED, UNSAID


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, context: Context) -> list[Encoded]:
    """Encode a conversation in the model's own chat template, each answer behind what the model sees in use.

    The tokenizer is the model's `without_post_processor`: `apply_chat_template` makes no use of it either.
    Parts that don't fit into the context lose their oldest turns. ValueError where there is nothing to learn, and where
    the template leaves out what was said or can't be taken apart.
    """
    conversation = in_template(tokenizer, chat)
    learnt = [i for i, is_learnt in enumerate(chat.learnt) if is_learnt]
    asked = [i for i in learnt if i > 0 or conversation.is_marked]  # no one asks a model to speak first
    answers = [i for i in asked if not loses(conversation, i, CALLS)]
    if not answers:
        why = "the model's chat template leaves out what it calls" if asked else _why_nothing(chat)
        raise ValueError(f"there is nothing in it to learn: {why}")
    conversation = conversation.of(conversation.messages[: answers[-1] + 1])
    check_nothing_is_lost(conversation, answers)
    parts = [
        context.newest_turns(conversation.messages, part, lambda rest, left: _parts(conversation.of(rest), left)[-1])
        for part in _parts(conversation, answers)
    ]
    tally = context.tally
    tally.answers_left_out += Counter({UNASKED: len(learnt) - len(asked), UNSAID: len(asked) - len(answers)})
    tally.reworded += sum(is_reworded(conversation, i) for i in answers)
    tally.ignored.update(f"messages: {printable(name)}" for name in ignored_fields(conversation))
    tally.switched_off += chat.switched_off
    return parts


def _why_nothing(chat: Chat) -> str:
    if not any(message["role"] == "assistant" for message in chat.messages):
        return "no message has the role `assistant`"
    return "nothing comes before what the assistant says" if any(chat.learnt) else "every answer is switched off"


def _parts(conversation: Conversation, answers: list[int]) -> list[Part]:
    """Return as few parts of a conversation as have every answer behind the rendering that the model sees in use."""
    if conversation.is_marked:
        return [(answers, _encode_marked(conversation, answers))]
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
        parts.append((group, encode_spans(conversation.tokenizer, conversation.answered(group[-1]), spans)))
    return parts


def _encode_marked(conversation: Conversation, answers: list[int]) -> Encoded:
    """Encode a conversation by the template's own marks, less the messages that aren't to be learnt."""
    tokens, mask = conversation.encode()
    rendered = conversation.answered(len(conversation.messages) - 1)
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and i not in answers:
            before, answered = conversation.answered(i - 1) if i else "", conversation.answered(i)
            if not rendered.startswith(answered) or not answered.startswith(before):
                raise ValueError(
                    f"{name_of(i + 1, message)} isn't to be learnt, but the model's chat template renders it otherwise "
                    "once more is said; leave the record out"
                )
            for first, last in encode_spans(conversation.tokenizer, rendered, [(len(before), len(answered))]).learnt:
                mask[first:last] = [0] * (last - first)
    positions = [list(run) for is_learnt, run in groupby(range(len(mask)), mask.__getitem__) if is_learnt]
    if not positions:
        raise ValueError("there is nothing in it to learn: the model's chat template marks nothing as the assistant's")
    return Encoded(tokens, [(run[0], run[-1] + 1) for run in positions])
