"""Render a conversation in the model's own chat template, and see that nothing in it is lost.

A template comes from the other party. transformers compiles it in jinja's sandbox, where it reaches nothing but what it
is given: one record's messages, tools, documents and variables. What a template makes no use of, it drops without a
word; so whether a field matters is found by rendering the conversation without it.
"""

import copy
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import one_line
from scaleot_core.records.forms import CALLS, Chat, Message, name_of

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "model": "assistant"}
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
REASONING = ("reasoning_content", "reasoning", "thinking")  # one field: transformers hands each over as the others too
CLOCK = (  # transformers' own has today's date alone, and no function may be given to a template
    "{%- macro strftime_now(format) -%}{%- set text = namespace(is=format) -%}{%- for name, value in clock.items() -%}"
    "{%- set text.is = text.is | replace(name, value) -%}{%- endfor -%}{{- text.is -}}{%- endmacro -%}"
)
DOCUMENT = ("title", "text", "content", "contents", "snippet")  # what a document says


class LeftOut(ValueError):
    """The template leaves a field of a record out, whatever is in it."""

    def __init__(self, field: str, remedy: str) -> None:
        super().__init__(f"the model's chat template leaves `{field}` out{remedy}")
        self.field = field


class Conversation:
    """One record's messages in a model's chat template; whatever the template raises is a ValueError."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], variables: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.messages = messages
        self.variables = variables
        self._rendered: dict[tuple[int, bool], str] = {}

    def of(self, messages: list[Message]) -> "Conversation":
        """Return another conversation in the same template, with the same tools, documents and variables."""
        return Conversation(self.tokenizer, messages, self.variables)

    @property
    def is_marked(self) -> bool:
        """Whether the template marks what the assistant generates."""
        return bool(MARK.search(self.source))

    @property
    def source(self) -> str:
        return str(self.tokenizer.get_chat_template(None, self.variables["tools"]))

    def asked(self, i: int) -> str:
        """Return what the model sees when it is asked for message `i`."""
        return self._prefix(i, asking=True)

    def answered(self, i: int) -> str:
        """Return the conversation up to message `i`, and with it."""
        return self._prefix(i + 1, asking=False)

    def _prefix(self, length: int, *, asking: bool) -> str:
        if (length, asking) not in self._rendered:
            self._rendered[length, asking] = self.render(self.messages[:length], asking=asking)
        return self._rendered[length, asking]

    def render(self, messages: list[Message], *, asking: bool = False, changed: dict[str, Any] | None = None) -> str:
        """Render messages, and if `asking` the header of an answer; `changed` takes the place of variables."""
        return str(
            self._apply(messages, tokenize=False, add_generation_prompt=asking, **(self.variables | (changed or {})))
        )

    def encode(self) -> tuple[list[int], list[int]]:
        """Encode the conversation; with it comes transformers' mask of what the assistant generates."""
        encoded = self._apply(
            self.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self.variables
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def differs(
        self, rendered: str, messages: list[Message], *, asking: bool = False, changed: dict[str, Any] | None = None
    ) -> bool:
        """Whether other messages or variables are rendered otherwise, or not at all."""
        try:
            return self.render(messages, asking=asking, changed=changed) != rendered
        except ValueError:
            return True

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except MemoryError:
            raise
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the model's chat template refuses it ({one_line(error)})") from None


def in_template(tokenizer: PreTrainedTokenizerBase, chat: Chat, now: datetime | None = None) -> Conversation:
    """Put a record's conversation in the model's chat template; ValueError where it has none, or not for a role."""
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template; use `prompt` and `completion`")
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", "clock"}
    if taken := sorted(reserved & (chat.variables or {}).keys()):
        raise ValueError(f"`chat_template_kwargs`: `{taken[0]}` is no variable of a chat template")
    variables = {**(chat.variables or {}), "tools": chat.tools, "documents": chat.documents}
    conversation = Conversation(tokenizer, chat.messages, variables)
    if now and "strftime_now" in conversation.source:
        names = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"]
        variables |= {"chat_template": CLOCK + conversation.source, "clock": {n: now.strftime(n) for n in names}}
    for number, message in enumerate(chat.messages, start=1):
        role = message["role"]
        if role not in ROLES and not any(f"{quote}{role}{quote}" in conversation.source for quote in "'\""):
            near = get_close_matches(role.lower(), ROLES, n=1, cutoff=0.75) or [role.lower()]
            meant = OTHER_ROLES.get(role.lower(), near[0])
            hint = f"; write `{meant}`" if meant in ROLES else f"; roles are {', '.join(ROLES)}"
            raise ValueError(f"message {number}: the role `{role}` is not known{hint}")
    return conversation.of(_plain_arguments(conversation))


def _plain_arguments(conversation: Conversation) -> list[Message]:
    """Return the messages, with arguments of tool calls as objects where the template needs them so.

    OpenAI's format has them as JSON in a text. Some templates print that as it is; others go through an object, or
    write any value as JSON, and the model would learn to call with a text that is quoted twice. Servers hand objects to
    these, as transformers documents it.
    """
    texts = [function["arguments"] for function in _functions(conversation.messages)]
    if not texts:
        return conversation.messages
    messages = copy.deepcopy(conversation.messages)
    for function in _functions(messages):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(function["arguments"].strip() or "{}")
            function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    try:
        rendered = conversation.render(conversation.messages)
    except ValueError:
        conversation.render(messages)
        return messages
    is_quoted = any(json.dumps(text, ensure_ascii=False) in rendered for text in texts)
    return messages if is_quoted else conversation.messages


def _functions(messages: list[Message]) -> Iterable[dict[str, Any]]:
    """Yield the functions of tool calls whose arguments are a text."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                yield function


def check_nothing_is_lost(conversation: Conversation, answers: list[int]) -> None:
    """Raise ValueError where the template leaves out tools, documents, or a field of a message, learnt or not.

    A word that occurs nowhere stands in the place of each word, and has to be in the rendering. The reasoning of
    earlier turns may go: each answer is learnt behind what the model is given, which has none then.
    """
    messages, shown = conversation.messages, conversation.answered(answers[-1])
    lost = _lost_fields(conversation, answers)
    for field in ("tools", "documents"):
        if conversation.variables[field] and not conversation.differs(shown, messages, changed={field: None}):
            calls = ", and calls of tools too" if field == "tools" and any(name in CALLS for _, name in lost) else ""
            raise LeftOut(field, f"{calls}; write them into a system message")
    probes, documents = Probes(conversation.source, shown), copy.deepcopy(conversation.variables["documents"] or [])
    for document in documents:
        document |= {name: probes.word(-1, name) for name in DOCUMENT if isinstance(document.get(name), str)}
    if documents and (lost_words := probes.lost(conversation.render(messages, changed={"documents": documents}))):
        raise ValueError(
            f"the model's chat template leaves `{lost_words[0][1]}` of `documents` out; write it elsewhere"
        )
    for j, field in lost:
        remedy = "; write it into `content` as the model is to say it, or delete it" if field in REASONING else ""
        raise ValueError(f"{name_of(j + 1, messages[j])}: the model's chat template leaves its `{field}` out{remedy}")


class Probes:
    """Words that occur nowhere, each in the place of a word of a field."""

    def __init__(self, source: str, rendered: str) -> None:
        self.names = set(re.findall(r"\w+", source))
        self.prefix = next(word for n in range(1000) if (word := f"zq{n}x") not in (source + rendered).lower())
        self.owners: list[tuple[int, str]] = []
        """Of each probe, the message and the field that it stands in."""

    def word(self, j: int, field: str) -> str:
        """Return a new word for a field."""
        self.owners.append((j, field))
        return f"{self.prefix}{len(self.owners) - 1}q"

    def text(self, j: int, field: str, text: str) -> str:
        """Put a new word in the place of each word but those that the template itself has, such as those of tags."""

        def replaced(match: re.Match[str]) -> str:
            return match[0] if match[0] in self.names else self.word(j, field)

        changed = re.sub(r"\w+", replaced, text)
        return self.word(j, field) if changed == text and text.strip() else changed

    def message(self, j: int, message: Message) -> Message:
        """Return a message with new words in the place of all that it says."""
        probed = copy.deepcopy(message)
        for field in ("content", *REASONING):
            if isinstance(probed.get(field), str):
                probed[field] = self.text(j, field, probed[field])
        for field in CALLS:
            calls = probed.get(field)
            for call in calls if isinstance(calls, list) else [calls]:
                function = call.get("function", call) if isinstance(call, dict) else {}
                if isinstance(function.get("name"), str):
                    function["name"] = self.word(j, field)
                if arguments := function.get("arguments"):
                    words = {self.word(j, field): self.word(j, field)}
                    function["arguments"] = json.dumps(words) if isinstance(arguments, str) else words
        return probed

    def lost(self, *rendered: str) -> list[tuple[int, str]]:
        """Return the owner of each word that no rendering has."""
        numbers = re.findall(rf"{self.prefix}(\d+)q", " ".join(rendered), re.IGNORECASE)
        shown = {int(number) for number in numbers}
        return [owner for number, owner in enumerate(self.owners) if number not in shown]


def _lost_fields(conversation: Conversation, answers: list[int]) -> list[tuple[int, str]]:
    """Return the messages, and their fields, of which the template leaves words out."""
    messages = conversation.messages
    probes = Probes(conversation.source, conversation.answered(answers[-1]))
    probed = [probes.message(j, message) for j, message in enumerate(messages)]
    lost = []
    for i, after in zip(answers, [-1, *answers], strict=False):
        new = range(after + 1, i + 1)
        shown = []
        for part in ([*new], *([j] for j in new)):  # together, or where the template refuses that, one by one
            with suppress(ValueError):
                shown.append(conversation.render([probed[j] if j in part else messages[j] for j in range(i + 1)]))
            if shown and len(part) == len(new):
                break
        missing = Counter(probes.lost(*shown)) if shown else Counter()
        for (j, field), count in sorted(missing.items()):
            is_earlier = j != i and messages[j]["role"] == "assistant"  # its thoughts may go by design
            if j in new and not (is_earlier and (field in REASONING or count < probes.owners.count((j, field)))):
                lost.append((j, field))
    return lost


def is_reworded(conversation: Conversation, i: int) -> bool:
    """Whether the template renders a message otherwise than word for word, blanks around it aside."""
    return conversation.messages[i]["content"].strip() not in conversation.answered(i)


def ignored_fields(conversation: Conversation) -> list[str]:
    """Return fields of messages, beside those that say something, that make no difference to the rendering."""
    meaningful = {"role", "content", *CALLS, *REASONING}
    names = sorted({name for message in conversation.messages for name in message} - meaningful)
    rendered = conversation.answered(len(conversation.messages) - 1) if names else ""

    def matter(dropped: Iterable[str]) -> bool:
        plain = [{k: v for k, v in message.items() if k not in dropped} for message in conversation.messages]
        return conversation.differs(rendered, plain)

    return names if not names or not matter(names) else [name for name in names if not matter([name])]
