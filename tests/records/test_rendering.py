"""What a record says beside its messages reaches the model, or is refused; nothing is lost without a word."""

import json
from datetime import datetime

import pytest
from helpers import refusal
from private_records import HI, learnt, read, tokens_of, turns
from tokenizer_kinds import STABLE, TOOLS

from scaleot_core.records.context import Context
from scaleot_core.records.reading import encode_records

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}}}


def calls(arguments, **message):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "tool_calls": [call], **message},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]


def test_tools_are_told_to_the_model(tmp_path, bos):
    bos.chat_template, messages = TOOLS, turns("1+1?", "two")
    for tools in ([ADD], json.dumps([ADD])):  # files whose columns have one type each hold it as text
        (example,) = read(tmp_path, bos, {"messages": messages, "tools": tools})
        assert tokens_of(example) == bos.apply_chat_template(messages, tools=[ADD], return_dict=False)
        assert '"name": "add"' in bos.decode(example[0]) and bos.decode(learnt(example)) == "two<|im_end|>\n"


def test_the_template_for_tools_is_taken_where_there_are_several(tmp_path, bos):
    bos.chat_template = {"default": STABLE["chatml"], "tool_use": TOOLS}
    for row in ({"messages": turns("1+1?", "two")}, {"messages": turns("1+1?", "two"), "tools": [ADD]}):
        (example,) = read(tmp_path, bos, row)
        assert tokens_of(example) == bos.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False)


@pytest.mark.parametrize("field", ["tools", "documents"])
def test_what_the_template_makes_no_use_of_is_refused(tmp_path, bos, field):
    values = {"tools": [ADD], "documents": [{"title": "a", "text": "b"}]}[field]
    row = {"messages": HI, field: values}
    error = refusal(read, tmp_path, bos, row, row, {"messages": HI}, row)
    assert f"line 1: the model's chat template leaves `{field}` out; write them" in error
    assert error.endswith("(so have line 2, line 4)")


def test_calls_that_are_left_out_with_the_tools_are_told(tmp_path, bos):
    error = refusal(read, tmp_path, bos, {"messages": calls("{}"), "tools": [ADD]})
    assert "leaves `tools` out, and calls of tools too; write them" in error


def test_documents_and_variables_reach_the_template(tmp_path, bos):
    documents = "{% for d in documents or [] %}{{ d.text }}<|im_end|>{% endfor %}"
    bos.chat_template = documents + "{% if loud %}LOUD{% endif %}" + STABLE["chatml"]
    row = {"messages": turns("hi", "hello"), "documents": [{"text": "b"}], "chat_template_kwargs": {"loud": True}}
    (example,) = read(tmp_path, bos, row)
    assert bos.decode(example[0]).startswith("b<|im_end|>LOUD<|im_start|>user")
    error = refusal(read, tmp_path, bos, {**row, "chat_template_kwargs": {"chat_template": "x"}})
    assert "`chat_template` is no variable" in error


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": ""}, {"content": None, "refusal": None}])
def test_a_call_of_a_tool_needs_no_content(tmp_path, bos, message):
    bos.chat_template = TOOLS
    messages = calls('{"a": 1}', **message)
    (example,) = read(tmp_path, bos, {"messages": messages, "tools": [ADD]})
    assert bos.decode(learnt(example)) == 'CALL add({"a": 1})<|im_end|>\ntwo<|im_end|>\n'
    assert tokens_of(example) == bos.apply_chat_template(messages, tools=[ADD], return_dict=False)


@pytest.mark.parametrize(
    "printed",
    ["c.function.arguments | tojson", "'{' ~ ('\"%s\": %s' | format(*(c.function.arguments | items | first))) ~ '}'"],
)
def test_arguments_are_what_the_template_takes_and_never_quoted_twice(tmp_path, bos, printed):
    bos.chat_template = TOOLS.replace("c.function.arguments", printed)
    for arguments in ('{"a": 1}', {"a": 1}):
        (example,) = read(tmp_path, bos, {"messages": calls(arguments)})
        assert 'CALL add({"a": 1})' in bos.decode(learnt(example))


@pytest.mark.parametrize("switch", [{}, {"weight": 0}])
def test_call_that_the_template_leaves_out_is_refused_learnt_or_not(tmp_path, bos, switch):
    error = refusal(read, tmp_path, bos, {"messages": calls("{}", **switch)})
    assert "message 2 (assistant): the model's chat template leaves its `tool_calls` out" in error


def test_call_without_arguments_is_learnt_with_none(tmp_path, bos):
    bos.chat_template = TOOLS.replace("c.function.arguments", "c.function.arguments | tojson")
    for arguments in ("", " ", "{}", {}):
        assert "CALL add({})" in bos.decode(learnt(read(tmp_path, bos, {"messages": calls(arguments)})[0]))


def test_reasoning_that_the_template_leaves_out_is_refused(tmp_path, bos):
    messages = turns("hi", "hello")
    for field in ("reasoning_content", "thinking"):
        messages[1] = {"role": "assistant", "content": "hello", field: "because"}
        assert f"leaves its `{field}` out" in refusal(read, tmp_path, bos, {"messages": messages})


NO_OTHERS = STABLE["chatml"].replace("in messages %}", "in messages if m.role in ('user', 'assistant') %}")


@pytest.mark.parametrize("word", ["be kind", "hello", "12", "user", "!"])
@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_message_that_the_template_leaves_out_is_refused_though_its_words_occur_elsewhere(tmp_path, bos, role, word):
    bos.chat_template, other = NO_OTHERS, {"role": role, "content": word}
    for messages in ([other, *turns(f"{word} hi", "hello")], [*turns("be", word), other, *HI]):
        number = messages.index(other) + 1
        error = refusal(read, tmp_path, bos, {"messages": messages})
        assert f"message {number} ({role}): the model's chat template leaves its `content` out" in error


def test_field_of_a_document_that_the_template_leaves_out_is_refused(tmp_path, bos):
    bos.chat_template = "{% for d in documents or [] %}{{ d.text }}{% endfor %}" + STABLE["chatml"]
    row = {"messages": HI, "documents": [{"title": "hi", "text": "hi"}]}
    assert "leaves `title` of `documents` out" in refusal(read, tmp_path, bos, row)


@pytest.mark.parametrize("part", ["name", "arguments"])
def test_part_of_a_call_that_the_template_leaves_out_is_refused(tmp_path, bos, part):
    bos.chat_template = TOOLS.replace(f"c.function.{part}", "'add'")
    assert "leaves its `tool_calls` out" in refusal(read, tmp_path, bos, {"messages": calls('{"a": 1}')})


def test_what_the_template_says_in_its_own_words_is_not_left_out(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("{% else %}{{ m.content }}", "{% else %}{{ m.content | tojson }}")
    (example,) = read(tmp_path, bos, {"messages": turns('say "hi"', "hello")})
    assert r'"say \"hi\""' in bos.decode(example[0])


def test_answer_that_the_template_rewords_is_told(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("{{ m.content }}", "{{ m.content | replace(' ', '_') }}")
    examples = read(tmp_path, bos, {"messages": turns("hi", "see you")}, {"messages": turns("hi", "hello")})
    assert bos.decode(learnt(examples[0])) == "see_you<|im_end|>\n" and examples.tally.reworded == 1


def test_thoughts_that_the_template_cuts_off_an_answer_are_refused(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    error = refusal(read, tmp_path, bos, {"messages": turns("hi", "<think>hm</think>hello")})
    assert "message 2 (assistant): the model's chat template leaves its `content` out" in error


def test_role_that_the_template_knows_is_taken(tmp_path, bos):
    bos.chat_template = "{% if messages[0].role == 'narrator' %}{% endif %}" + STABLE["chatml"]
    (example,) = read(tmp_path, bos, {"messages": [{"role": "narrator", "content": "once"}, *HI]})
    assert "narrator" in bos.decode(example[0])


def test_template_that_refuses_is_quoted(tmp_path, bos):
    bos.chat_template = STABLE["llama 2"]
    error = refusal(read, tmp_path, bos, {"messages": [HI[0], *HI]})
    assert "line 1: the model's chat template refuses it (roles must alternate)" in error


def test_template_in_the_sandbox_reaches_nothing(tmp_path, bos):
    bos.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + STABLE["chatml"]
    assert "the model's chat template refuses it (access to attribute" in refusal(read, tmp_path, bos, {"messages": HI})


def test_date_in_a_template_is_the_one_that_is_given(tmp_path, bos):
    bos.chat_template = "{{ strftime_now('%-d. %B %Y') }}" + STABLE["chatml"]
    context = Context(2048, now=datetime(2026, 2, 1))
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": HI}))
    ((_, (encoded,)),) = encode_records(bos, tmp_path / "own.jsonl", context, packed=True)
    assert bos.decode(encoded.tokens).startswith("1. February 2026<|im_start|>")
