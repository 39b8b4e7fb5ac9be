"""Try what a model's chat template renders, so that a data owner knows it before preparing records."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from scaleot_core.records.forms import Message
from scaleot_core.records.rendering import Conversation

WORD = "zebra"  # what a rendering is searched for
ASKED: list[Message] = [{"role": "user", "content": "What is 1+1?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": WORD, "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call12345", "type": "function", "function": {"name": WORD, "arguments": {}}}],
}


def rendered_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Say of the parts of a conversation whether the chat template renders them; empty where there is no template."""
    if tokenizer.chat_template is None:
        return {}
    plain: dict[str, Any] = {"tools": None, "documents": None}
    return {
        "system messages": _renders(tokenizer, [{"role": "system", "content": WORD}, *ASKED], plain),
        "tools": _renders(tokenizer, ASKED, {**plain, "tools": [TOOL]}),
        "calls of tools": _renders(tokenizer, [*ASKED, CALL], plain)
        or _renders(tokenizer, [*ASKED, {**CALL, "content": None}], plain),
    }


def _renders(tokenizer: PreTrainedTokenizerBase, messages: list[Message], variables: dict[str, Any]) -> bool:
    try:
        return WORD in Conversation(tokenizer, messages, variables).render(messages)
    except ValueError:  # the template refuses it
        return False
