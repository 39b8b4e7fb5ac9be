"""What a record says beside its messages reaches the model, or is refused; nothing is lost without a word."""

import json

import pytest
from helpers import refusal
from private_records import HI, learnt, read, tokens_of, turns
from tokenizer_kinds import STABLE, TOOLS

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
    given = {"tools": [ADD], "documents": [{"title": "a", "text": "b"}]}[field]
    error = refusal(read, tmp_path, bos, {"messages": turns("hi", "hello"), field: given})
    assert f"line 1: the model's chat template leaves `{field}` out; write them" in error
    row = {"messages": turns("hi", "hello")}
    error = refusal(read, tmp_path, bos, *[{**row, field: given}] * 2, row, {**row, field: given})
    assert error.endswith("(so have line 2, line 4)")
    if field == "tools":
        error = refusal(read, tmp_path, bos, {"messages": calls("{}"), field: given})
        assert "leaves `tools` out, and calls of tools too; write them" in error


def test_documents_and_variables_reach_the_template(tmp_path, bos):
    bos.chat_template = (
        "{% for d in documents or [] %}{{ d.text }}<|im_end|>{% endfor %}{% if loud %}LOUD{% endif %}"
        + STABLE["chatml"]
    )
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


def test_call_that_the_template_leaves_out_is_not_learnt_as_silence(tmp_path, bos):
    (example,) = examples = read(tmp_path, bos, {"messages": calls("{}")})
    assert bos.decode(learnt(example)) == "two<|im_end|>\n"
    assert examples.tally.answers_left_out == {"the model's chat template leaves their calls of tools out": 1}
    assert examples.tally.places == {"the model's chat template leaves their calls of tools out": ["line 1"]}
    assert "nothing in it to learn" in refusal(read, tmp_path, bos, {"messages": calls("{}")[:2]})


def test_reasoning_that_the_template_leaves_out_is_refused(tmp_path, bos):
    messages = turns("hi", "hello")
    for field in ("reasoning_content", "thinking"):
        messages[1] = {"role": "assistant", "content": "hello", field: "because"}
        assert f"leaves its `{field}` out" in refusal(read, tmp_path, bos, {"messages": messages})


def test_message_that_the_template_leaves_out_is_refused(tmp_path, bos):
    bos.chat_template = (
        "{% for m in messages if m.role != 'developer' %}{{ m.role + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    error = refusal(
        read, tmp_path, bos, {"messages": [{"role": "developer", "content": "be kind"}, *turns("hi", "hello")]}
    )
    assert "message 1 (developer): the model's chat template leaves it out" in error


def test_what_the_template_says_in_its_own_words_is_not_left_out(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("{% else %}{{ m.content }}", "{% else %}{{ m.content | tojson }}")
    (example,) = read(tmp_path, bos, {"messages": turns('say "hi"', "hello")})
    assert r'"say \"hi\""' in bos.decode(example[0])


def test_answer_that_the_template_rewords_is_told(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace(
        "{{ m.content }}<|im_end|>\n{% else %}", "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% else %}"
    )
    examples = read(
        tmp_path, bos, {"messages": turns("hi", "<think>hm</think>hello")}, {"messages": turns("hi", "hello")}
    )
    assert bos.decode(learnt(examples[0])) == "hello<|im_end|>\n" and examples.tally.reworded == 1


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
