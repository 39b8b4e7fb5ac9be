"""Render a conversation in the model's own chat template, and see that nothing in it is lost.

A template comes from the other party. transformers compiles it in jinja's sandbox, where it reaches nothing but what it
is given: one record's messages, tools, documents and variables. What a template makes no use of, it drops without a
word; so whether a field matters is found by rendering the conversation without it.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.common.errors import one_line
from scaleot_core.records.forms import CALLS, Chat, Message, name_of

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "model": "assistant"}
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
REASONING = ("reasoning_content", "reasoning", "thinking")  # one field: transformers hands each over as the others too


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
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the model's chat template refuses it ({one_line(error)})") from None


def in_template(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Conversation:
    """Put a record's conversation in the model's chat template; ValueError where it has none, or not for a role."""
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template; use `prompt` and `completion`")
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    if taken := sorted(reserved & (chat.variables or {}).keys()):
        raise ValueError(f"`chat_template_kwargs`: `{taken[0]}` is no variable of a chat template")
    variables = {**(chat.variables or {}), "tools": chat.tools, "documents": chat.documents}
    conversation = Conversation(tokenizer, chat.messages, variables)
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
            arguments = json.loads(function["arguments"])
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
    """Raise ValueError where the template leaves out tools, documents, a message before an answer, or its reasoning."""
    messages, shown = conversation.messages, conversation.answered(answers[-1])
    read = messages[: answers[-1] + 1]
    for field in ("tools", "documents"):
        if conversation.variables[field] and not conversation.differs(shown, read, changed={field: None}):
            lost = any(loses(conversation, i, CALLS) for i in range(len(read)))
            calls = ", and calls of tools too" if field == "tools" and lost else ""
            raise LeftOut(field, f"{calls}; write them into a system message")
    for i, after in zip(answers, [-1, *answers], strict=False):
        for j in range(after + 1, i):
            content = messages[j]["content"].strip()
            changed = [*messages[:j], {**messages[j], "content": f"{content}."}, *messages[j + 1 : i]]
            rendered = conversation.asked(i)
            if content and content not in rendered and not conversation.differs(rendered, changed, asking=True):
                raise ValueError(f"{name_of(j + 1, messages[j])}: the model's chat template leaves it out")
    for i in answers:
        if loses(conversation, i, REASONING):
            field = next(name for name in REASONING if name in messages[i])
            raise ValueError(
                f"{name_of(i + 1, messages[i])}: the model's chat template leaves its `{field}` out; write it into "
                "`content` as the model is to say it, or delete it"
            )


def loses(conversation: Conversation, i: int, fields: Sequence[str]) -> bool:
    """Whether message `i` has some of the fields, and they make no difference where it is rendered as the last."""
    message = conversation.messages[i]
    without = {name: value for name, value in message.items() if name not in fields}
    before = conversation.messages[:i]
    return without != message and not conversation.differs(conversation.answered(i), [*before, without])


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
