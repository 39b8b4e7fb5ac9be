"""Read what a data owner's record says: a prompt and its completion, a conversation, or a text.

Known are the forms of OpenAI's fine-tuning files and of trl. What would change the meaning of a record and can't be
heeded is refused; a field that says nothing to a model, such as an id, is left out, and its name kept to be told.
ValueErrors here say what is wrong with a record; whoever reads the file adds where it lies.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from scaleot_core.data.rows import Row

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, of which some of the assistant's messages are learnt."""

    messages: list[Message]
    learnt: list[bool]
    """Of each message, whether it is."""
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None
    """Further variables of the chat template, such as `enable_thinking`."""
    switched_off: int = 0
    """Answers that a switch of theirs, such as `weight`: 0, keeps from being learnt."""


FORMS = {"completion": {"prompt", "completion"}, "messages": {"messages"}, "text": {"text"}}
BESIDE_MESSAGES = {"tools", "documents", "chat_template_kwargs"}
SWITCHES = ("weight", "train", "loss")  # whether a message is learnt, as OpenAI, axolotl and ms-swift say it
CALLS = ("tool_calls", "function_call")
TEXT_PARTS = ("text", "input_text", "output_text")  # of a message's content

# Fields that change what a record means, and what to do about them.
MEANT = {
    "system": "put it into `messages` as the first one, or in front of `prompt`",
    "functions": "write them as `tools`, beside `messages`",
    "function_call": "write it as `tools`, beside `messages`",
    "tools": "they go with `messages`",
    "documents": "they go with `messages`",
    "chat_template_kwargs": "they go with `messages`",
    "suffix": "write it into `prompt`, as the model has it",
    "chosen": "preferences can't be learnt; keep the better answer as `completion`",
    "rejected": "preferences can't be learnt; keep the better answer as `completion`",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "text alone can be learnt"),
}
CONVERSATIONS = (
    "ShareGPT's form; rename `conversations` to `messages`, `from` to `role` (human is user, gpt is assistant) and "
    "`value` to `content`"
)
ALPACA = "Alpaca's form; write {}`prompt`, the instruction and its input as the model will be asked, and `completion`"
WITH_TEMPLATE = "`messages`, for the model's chat template, or "

# What people call our fields.
SYNONYMS = {
    "prompt": ("instruction", "question", "query", "input", "context"),
    "completion": ("output", "response", "answer", "target", "chosen"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "content": ("value", "text", "message"),
    "role": ("from", "speaker", "author"),
}


def form_of(row: Row) -> str | None:
    """Say which form a row is of, a key of `FORMS`, or None; ValueError where it is of two."""
    forms = [form for form, fields in FORMS.items() if any(row.get(field) is not None for field in fields)]
    if len(forms) > 1:  # an empty cell of a CSV is its null
        forms = [form for form in forms if any(row.get(field) not in (None, "") for field in FORMS[form])] or forms
    if "messages" in forms and _repeats_a_message(row):
        forms.remove("completion")
    if len(forms) > 1:
        names = [f"`{name}`" for form in forms for name in sorted(FORMS[form]) if row.get(name) is not None]
        raise ValueError(f"it has {', '.join(names[:-1])} and {names[-1]}, which are two forms of a record; keep one")
    return forms[0] if forms else None


def _repeats_a_message(row: Row) -> bool:
    """Whether all of a prompt is one of the messages again, as in UltraChat's and No Robots' columns."""
    prompt, messages = row.get("prompt"), row["messages"]
    if prompt is None or row.get("completion") is not None or not isinstance(messages, list):
        return False
    return any(isinstance(message, dict) and message.get("content") == prompt for message in messages)


def other_form(row: Row, *, has_template: bool) -> str:
    """Say what a row of no form of ours seems to be, as the end of a sentence, or nothing.

    Where the model has a chat template, conversations come first.
    """
    for name in SYNONYMS["messages"]:
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return f"; this is {CONVERSATIONS}" if "value" in turns[0] else f"; rename `{name}` to `messages`"
    if "instruction" in row and not _suggest("messages", row):
        return f"; this is {ALPACA.format(WITH_TEMPLATE if has_template else '')}"
    if "chosen" in row and "rejected" in row:
        return f"; {MEANT['chosen']}"
    return "".join(filter(None, (_suggest(name, row) for name in ("prompt", "completion", "messages", "text"))))


def is_chat(row: Row, form: str) -> bool:
    """Whether a row of a form is a conversation, whole or in two parts: a prompt and a completion of messages."""
    return form == "messages" or (form == "completion" and any(isinstance(row.get(name), list) for name in FORMS[form]))


def unread_fields(row: Row, form: str) -> list[str]:
    """Return the names of fields that say nothing to the model; ValueError where one would change the row's meaning."""
    read = FORMS[form] | (BESIDE_MESSAGES if is_chat(row, form) else set())
    names = [name for name, value in row.items() if name not in read and value not in ([], {}, "")]
    for name in names:
        if name in MEANT:
            raise ValueError(f"`{name}` stands beside `{form}`, and would be lost: {MEANT[name]}")
        if (name == "label" and isinstance(row[name], bool)) or (name == "weight" and row[name] != 1):
            raise ValueError(f"`{name}` = {row[name]!r} can't be heeded: every record counts the same; leave it out")
    return names


def text_of(row: Row, field: str) -> str:
    """Return a field's text; ValueError where it is none, or empty, which a prompt alone may be."""
    value = row.get(field)
    if not isinstance(value, str) or (field != "prompt" and not value.strip()):
        hint = _suggest(field, row) if field not in row else ""
        raise ValueError(f"`{field}` is missing{'' if field == 'prompt' else ', empty'} or no text{hint}")
    return value


def chat_of(row: Row, form: str) -> Chat:
    """Return a row's conversation; of a prompt and a completion the second is learnt. ValueError where it is none."""
    parts = [_list_of(row.get(name)) for name in (["messages"] if form == "messages" else ["prompt", "completion"])]
    if not all(isinstance(part, list) for part in parts):
        what = "`messages` is a list" if form == "messages" else "`prompt` and `completion` are both lists"
        raise ValueError(f"{what} of objects with `role` and `content`")
    messages = [message for part in parts for message in part or []]
    parsed = [_message(number, message) for number, message in enumerate(messages, start=1)]
    first = len(parts[0] or []) if form == "completion" else 0
    return Chat(
        [message for message, _ in parsed],
        [learnt and number >= first for number, (_, learnt) in enumerate(parsed)],
        tools=_objects(row, "tools"),
        documents=_objects(row, "documents"),
        variables=_variables(row),
        switched_off=sum(m["role"] == "assistant" and not learnt for m, learnt in parsed),
    )


def _objects(row: Row, field: str) -> list[dict[str, Any]] | None:
    """Return a list of objects, also where it comes as JSON in a text, as in files whose columns have one type.

    Fields that are null go: files whose rows have one type each have those of all other rows too.
    """
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"`{field}` is a text that isn't JSON; a list of objects is needed") from None
    value = _without_nulls(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"`{field}` is a list of objects")
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _list_of(value: Any) -> Any:
    """Return a list that may come as JSON in a text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _variables(row: Row) -> dict[str, Any]:
    value = row.get("chat_template_kwargs") or {}
    if not isinstance(value, dict):
        raise ValueError("`chat_template_kwargs` is an object: a value for each variable of the chat template")
    return value


def name_of(number: int, message: Mapping[str, Any]) -> str:
    """Name a message, counted from 1, in a sentence."""
    return f"message {number} ({message['role']})"


def _message(number: int, entry: Any) -> tuple[Message, bool]:
    """Return a message as chat templates take it, and whether it is learnt.

    Its content becomes one text; what is null goes, as transformers leaves it out too.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"message {number} is a {type(entry).__name__}; an object with `role` and `content` is needed")
    message = {name: value for name, value in entry.items() if value is not None and not (name in CALLS and not value)}
    role = message.get("role")
    if not isinstance(role, str):
        hint = f"; this is {CONVERSATIONS}" if {"from", "value"} <= message.keys() else _suggest("role", message)
        raise ValueError(f"message {number} has no `role`{hint}")
    where = name_of(number, message)
    calls = role == "assistant" and any(name in message for name in CALLS)
    if "content" not in message and not calls:
        raise ValueError(f"{where} has no `content`{_suggest('content', message)}")
    message["content"] = _content(where, message.get("content", ""))
    learnt = role == "assistant"
    for name in SWITCHES:
        switch = message.pop(name, 1)
        if switch not in (0, 1):
            raise ValueError(f"{where}: `{name}` = {switch!r}: it is learnt or not; say 1 or 0")
        learnt = learnt and bool(switch)
    if "train_detail" in message:
        raise ValueError(f"{where}: `train_detail` can't be heeded; a message is learnt whole, or not (`weight`: 0)")
    if learnt and not calls and not message["content"].strip():
        raise ValueError(f"{where} is empty; write the answer, delete it, or set its `weight` to 0")
    return message, learnt


def _content(where: str, value: Any) -> str:
    """Return the text of a message; a list of parts is joined, as templates that print them do."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}: its `content` is a {type(value).__name__}; a text is needed")
    texts = []
    for number, part in enumerate(value, start=1):
        kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("text", part)
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise ValueError(f"{where}: part {number} of its `content` is of type {kind!r}; text alone can be learnt")
        texts.append(text)
    return "".join(texts)


def _suggest(field: str, row: Mapping[str, Any]) -> str:
    """Ask whether a field that is missing was meant by one that is there; nothing if none looks like it."""
    others = [name for name in row if name not in {"prompt", "completion", "messages", "text", "role", "content"}]
    near = get_close_matches(field, others, n=1, cutoff=0.75) or [n for n in SYNONYMS.get(field, ()) if n in row]
    return f"; is `{near[0]}` meant for `{field}`?" if near else ""
