"""A conversation is learnt in the tokens that the model sees when it is used, whatever its tokenizer and template."""

import copy
import json

import pytest
from helpers import TEST_DATA, refusal, tiny_model
from tokenizer_kinds import KINDS, MARKED, REWRITING, STABLE, TOOLS
from transformers import AutoTokenizer

from scaleot_core.records.encoding import without_post_processor
from scaleot_core.tuning.examples import IGNORED, from_file

CONTEXT = 2048


@pytest.fixture(scope="module")
def tokenizers():
    """Each is built once; a test that gives one a template takes a copy."""
    return {kind: build() for kind, build in KINDS.items()}


@pytest.fixture(params=sorted(KINDS))
def kind(request, tokenizers):
    return copy.deepcopy(tokenizers[request.param])


@pytest.fixture
def bos(tokenizers):
    """LLaMA 3's kind: the post-processor adds a BOS, and takes spaces off the offsets."""
    return copy.deepcopy(tokenizers["bos"])


def said(*turns):
    """Messages, by turns of the user and the assistant; a system prompt comes first where it is a pair."""
    messages = [{"role": "system", "content": turns[0][0]}] if isinstance(turns[0], tuple) else []
    words = turns[len(messages) :]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]


def made(folder, tokenizer, *rows, context=CONTEXT, packed=True):
    file = folder / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    model = tiny_model("llama", vocab_size=max(300, len(tokenizer)), max_position_embeddings=context)
    return from_file(model, tokenizer, file, block_size=64, packed=packed)


def whole(example):
    return [*example[0], example[1][-1]]


def learnt(example):
    return [target for target in example[1] if target != IGNORED]


def in_use(tokenizer, messages, **options):
    """What a model is given when it is asked for an answer."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


def mask_of(example):
    """Which tokens of a conversation are learnt."""
    return [False, *(target != IGNORED for target in example[1])]


def reference(tokenizer, template, messages):
    """Which tokens transformers says that the assistant generates, where a template marks it.

    With spaces in the offsets: else a mark before a space counts for nothing. Of a last character that takes several
    tokens transformers has the first; here all of them count.
    """
    marked = without_post_processor(tokenizer)
    marked.chat_template = template
    found = marked.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    mask, offsets = [bool(mark) for mark in found["assistant_masks"]], found["offset_mapping"]
    for k in range(1, len(mask)):
        mask[k] = mask[k] or (mask[k - 1] and offsets[k][0] < offsets[k - 1][1])
    return mask


CONVERSATIONS = {
    "one turn": said("hi", "hello there"),
    "several": said("hi", "hello", "bye", "see you", "the cap", "capital"),
    "system": said(("be kind",), "hi", "hello", "bye", "see you"),
    "blanks and others": said("  hi ", " hello\n\n", "é 😀", "naïve 😀"),
}


# --- templates that keep what was said -------------------------------------------------------------------


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", STABLE)
def test_tokens_are_those_of_the_whole_conversation_and_of_what_is_asked_in_use(tmp_path, kind, template, messages):
    kind.chat_template = STABLE[template]
    (example,) = made(tmp_path, kind, {"messages": messages})
    assert whole(example) == kind.apply_chat_template(messages, return_dict=False)
    assert mask_of(example) == reference(kind, MARKED[template], messages)


@pytest.mark.parametrize("template", ["chatml", "default system"])  # in them no token is partly of an answer
def test_each_answer_stands_behind_exactly_what_the_model_is_given(tmp_path, kind, template):
    kind.chat_template, messages = STABLE[template], CONVERSATIONS["system"]
    (example,) = made(tmp_path, kind, {"messages": messages})
    for i in (2, 4):
        given = in_use(kind, messages[:i])
        assert whole(example)[: len(given)] == given
        assert example[1][len(given) - 2] == IGNORED != example[1][len(given) - 1]


def test_no_bos_is_learnt_and_none_stands_twice(tmp_path, kind):
    for template in STABLE.values():
        kind.chat_template = template
        (example,) = made(tmp_path, kind, {"messages": CONVERSATIONS["several"]})
        text = kind.apply_chat_template(CONVERSATIONS["several"], tokenize=False)
        assert whole(example).count(kind.bos_token_id) == text.count(kind.bos_token)
        assert kind.bos_token == kind.eos_token or kind.bos_token_id not in learnt(example)


def test_every_answer_is_learnt_with_the_end_of_its_turn(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    (example,) = made(tmp_path, bos, {"messages": CONVERSATIONS["several"]})
    assert bos.decode(learnt(example)) == "hello<|im_end|>see you<|im_end|>capital<|im_end|>"


def test_what_is_said_after_the_last_answer_is_left_out(tmp_path, bos):
    bos.chat_template, messages = STABLE["llama 3"], said("hi", "hello", "bye")
    (example,) = made(tmp_path, bos, {"messages": messages})
    assert whole(example) == bos.apply_chat_template(messages[:2], return_dict=False)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["gpt2"])
def test_a_real_tokenizer(tmp_path, folder):
    if not (TEST_DATA / "tokenizers" / folder).exists():
        pytest.skip(f"{TEST_DATA / 'tokenizers' / folder} is not there")
    tokenizer = AutoTokenizer.from_pretrained(TEST_DATA / "tokenizers" / folder)
    for template, text in STABLE.items():
        tokenizer.chat_template = text
        for messages in CONVERSATIONS.values():
            (example,) = made(tmp_path, tokenizer, {"messages": messages})
            assert whole(example) == tokenizer.apply_chat_template(messages, return_dict=False)
            assert mask_of(example) == reference(tokenizer, MARKED[template], messages)


# --- templates with marks --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", MARKED)
def test_marks_of_the_template_say_what_is_learnt(tmp_path, kind, template):
    kind.chat_template = MARKED[template]
    for messages in CONVERSATIONS.values():
        (example,) = made(tmp_path, kind, {"messages": messages})
        found = without_post_processor(kind).apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert example[0] == found["input_ids"][:-1] and sum(found["assistant_masks"]) > 0
        assert mask_of(example) == [mark == 1 for mark in found["assistant_masks"]]


def test_marks_may_leave_out_the_end_of_a_turn_or_take_in_more(tmp_path, bos):
    bos.chat_template = (
        "{% for m in messages %}{{ m.role + '\n' }}{% generation %}{{ m.content }}{% endgeneration %}"
        "<|im_end|>{% endfor %}"
    )
    (example,) = made(tmp_path, bos, {"messages": said("hi", "hello")})
    assert bos.decode(learnt(example)) == "hihello"  # the template says so of the user too


# --- templates that rewrite ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", REWRITING)
def test_answers_that_a_template_rewrites_are_learnt_as_in_use(tmp_path, kind, template):
    kind.chat_template, messages = REWRITING[template], CONVERSATIONS["system"]
    examples = made(tmp_path, kind, {"messages": messages})
    assert list(examples.origins) == [0, 0] and examples.tally.records == 1
    for i, example in zip((2, 4), examples, strict=True):
        assert whole(example) == kind.apply_chat_template(messages[: i + 1], return_dict=False)
        text, asked = (
            kind.apply_chat_template(messages[: i + 1], tokenize=False),
            kind.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True),
        )
        assert kind.decode(learnt(example)).strip() == kind.decode(_tail(kind, text, len(asked))).strip()


def _tail(tokenizer, text, start):
    """Tokens of a text from a character on, one that it shares with what is before included."""
    found = without_post_processor(tokenizer)(text, return_offsets_mapping=True)
    return [t for t, (_, end) in zip(found["input_ids"], found["offset_mapping"], strict=True) if end > start]


def test_thinking_is_learnt_where_the_model_will_think(tmp_path, bos):
    bos.chat_template = REWRITING["thinking"]
    messages = said("hi", "hello", "bye", "see you")
    messages[3]["reasoning_content"] = "the answer"
    first, second = made(tmp_path, bos, {"messages": messages})
    assert bos.decode(learnt(first)) == "<think>\n\n</think>\n\nhello<|im_end|>\n"
    assert bos.decode(learnt(second)) == "<think>\nthe answer\n</think>\n\nsee you<|im_end|>\n"
    assert "<think>" not in bos.decode(whole(second)).split("bye")[0]


def test_answers_after_the_last_question_are_one_example(tmp_path, bos):
    bos.chat_template = REWRITING["thinking"]
    messages = [
        *said("hi", "hello", "bye", "see"),
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "you"},
    ]
    first, second = made(tmp_path, bos, {"messages": messages})
    end = "<|im_end|>\n"
    assert bos.decode(learnt(first)) == f"<think>\n\n</think>\n\nhello{end}"
    assert bos.decode(learnt(second)) == f"<think>\n\n</think>\n\nsee{end}<think>\n\n</think>\n\nyou{end}"


def test_privacy_takes_one_example_a_record_and_says_what_that_costs(tmp_path, bos):
    bos.chat_template, messages = REWRITING["thinking"], said("hi", "hello", "bye", "see you")
    (example,) = private = made(tmp_path, bos, {"messages": messages}, packed=False)
    assert whole(example) == bos.apply_chat_template(messages, return_dict=False)
    assert private.tally.answers_left_out.total() == 1


def test_template_that_asks_otherwise_than_it_renders_is_refused(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    found = refusal(made, tmp_path, bos, {"messages": said("hi", "hello")})
    assert (
        "line 1: message 2 (assistant): the model's chat template doesn't keep" in found
        and r"'<think>\n' goes" in found
    )


# --- what a record says beside its messages --------------------------------------------------------------

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
    bos.chat_template, messages = TOOLS, said("1+1?", "two")
    for tools in ([ADD], json.dumps([ADD])):  # files whose columns have one type each hold it as text
        (example,) = made(tmp_path, bos, {"messages": messages, "tools": tools})
        assert whole(example) == bos.apply_chat_template(messages, tools=[ADD], return_dict=False)
        assert '"name": "add"' in bos.decode(example[0]) and bos.decode(learnt(example)) == "two<|im_end|>\n"


def test_the_template_for_tools_is_taken_where_there_are_several(tmp_path, bos):
    bos.chat_template = {"default": STABLE["chatml"], "tool_use": TOOLS}
    for row in ({"messages": said("1+1?", "two")}, {"messages": said("1+1?", "two"), "tools": [ADD]}):
        (example,) = made(tmp_path, bos, row)
        assert whole(example) == bos.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=False)


@pytest.mark.parametrize("field", ["tools", "documents"])
def test_what_the_template_makes_no_use_of_is_refused(tmp_path, bos, field):
    bos.chat_template = STABLE["chatml"]
    given = {"tools": [ADD], "documents": [{"title": "a", "text": "b"}]}[field]
    found = refusal(made, tmp_path, bos, {"messages": said("hi", "hello"), field: given})
    assert f"line 1: the model's chat template leaves `{field}` out; write them" in found
    row = {"messages": said("hi", "hello")}
    found = refusal(made, tmp_path, bos, *[{**row, field: given}] * 2, row, {**row, field: given})
    assert found.endswith("(so have line 2, line 4)")
    if field == "tools":
        found = refusal(made, tmp_path, bos, {"messages": calls("{}"), field: given})
        assert "leaves `tools` out, and calls of tools too; write them" in found


def test_documents_and_variables_reach_the_template(tmp_path, bos):
    bos.chat_template = (
        "{% for d in documents or [] %}{{ d.text }}<|im_end|>{% endfor %}{% if loud %}LOUD{% endif %}"
        + STABLE["chatml"]
    )
    row = {"messages": said("hi", "hello"), "documents": [{"text": "b"}], "chat_template_kwargs": {"loud": True}}
    (example,) = made(tmp_path, bos, row)
    assert bos.decode(example[0]).startswith("b<|im_end|>LOUD<|im_start|>user")
    found = refusal(made, tmp_path, bos, {**row, "chat_template_kwargs": {"chat_template": "x"}})
    assert "`chat_template` is no variable" in found


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": ""}, {"content": None, "refusal": None}])
def test_a_call_of_a_tool_needs_no_content(tmp_path, bos, message):
    bos.chat_template = TOOLS
    messages = calls('{"a": 1}', **message)
    (example,) = made(tmp_path, bos, {"messages": messages, "tools": [ADD]})
    assert bos.decode(learnt(example)) == 'CALL add({"a": 1})<|im_end|>\ntwo<|im_end|>\n'
    assert whole(example) == bos.apply_chat_template(messages, tools=[ADD], return_dict=False)


@pytest.mark.parametrize(
    "printed",
    ["c.function.arguments | tojson", "'{' ~ ('\"%s\": %s' | format(*(c.function.arguments | items | first))) ~ '}'"],
)
def test_arguments_are_what_the_template_takes_and_never_quoted_twice(tmp_path, bos, printed):
    bos.chat_template = TOOLS.replace("c.function.arguments", printed)
    for arguments in ('{"a": 1}', {"a": 1}):
        (example,) = made(tmp_path, bos, {"messages": calls(arguments)})
        assert 'CALL add({"a": 1})' in bos.decode(learnt(example))


def test_call_that_the_template_leaves_out_is_not_learnt_as_silence(tmp_path, bos):
    bos.chat_template = STABLE["chatml"]
    (example,) = examples = made(tmp_path, bos, {"messages": calls("{}")})
    assert bos.decode(learnt(example)) == "two<|im_end|>\n"
    assert examples.tally.answers_left_out == {"the model's chat template leaves their calls of tools out": 1}
    assert examples.tally.places == {"the model's chat template leaves their calls of tools out": ["line 1"]}
    assert "nothing in it to learn" in refusal(made, tmp_path, bos, {"messages": calls("{}")[:2]})


def test_reasoning_that_the_template_leaves_out_is_refused(tmp_path, bos):
    bos.chat_template, messages = STABLE["chatml"], said("hi", "hello")
    for field in ("reasoning_content", "thinking"):
        messages[1] = {"role": "assistant", "content": "hello", field: "because"}
        assert f"leaves its `{field}` out" in refusal(made, tmp_path, bos, {"messages": messages})


def test_message_that_the_template_leaves_out_is_refused(tmp_path, bos):
    bos.chat_template = (
        "{% for m in messages if m.role != 'developer' %}{{ m.role + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    found = refusal(
        made, tmp_path, bos, {"messages": [{"role": "developer", "content": "be kind"}, *said("hi", "hello")]}
    )
    assert "message 1 (developer): the model's chat template leaves it out" in found


def test_what_the_template_says_in_its_own_words_is_not_left_out(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("{% else %}{{ m.content }}", "{% else %}{{ m.content | tojson }}")
    (example,) = made(tmp_path, bos, {"messages": said('say "hi"', "hello")})
    assert r'"say \"hi\""' in bos.decode(example[0])


def test_answer_that_the_template_rewords_is_told(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace(
        "{{ m.content }}<|im_end|>\n{% else %}", "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% else %}"
    )
    examples = made(
        tmp_path, bos, {"messages": said("hi", "<think>hm</think>hello")}, {"messages": said("hi", "hello")}
    )
    assert bos.decode(learnt(examples[0])) == "hello<|im_end|>\n" and examples.tally.reworded == 1


# --- which messages are learnt ---------------------------------------------------------------------------


@pytest.mark.parametrize("templates", [STABLE, MARKED], ids=["", "marked"])
@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_answer_that_is_switched_off_is_read_and_not_learnt(tmp_path, kind, switch, templates):
    kind.chat_template, messages = templates["llama 3"], said("hi", "hello", "bye", "see you")
    messages[1] |= switch
    messages[3] |= {"weight": 1}
    (example,) = examples = made(tmp_path, kind, {"messages": messages})
    assert whole(example) == kind.apply_chat_template(said("hi", "hello", "bye", "see you"), return_dict=False)
    assert kind.decode(learnt(example)).strip() == "see you<|im_end|>"
    assert examples.tally.switched_off == 1 and examples.tally.answers_left_out == {}


@pytest.mark.parametrize("switch", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"train_detail": []}])
def test_switch_that_cannot_be_heeded_is_refused(tmp_path, bos, switch):
    bos.chat_template, messages = STABLE["llama 3"], said("hi", "hello")
    messages[1] |= switch
    assert f"message 2 (assistant): `{next(iter(switch))}`" in refusal(made, tmp_path, bos, {"messages": messages})


def test_what_no_one_asked_for_is_read_and_not_learnt(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    messages = [{"role": "assistant", "content": "hello"}, *said("hi", "see you")]
    (example,) = examples = made(tmp_path, bos, {"messages": messages})
    assert whole(example) == bos.apply_chat_template(messages, return_dict=False)
    assert bos.decode(learnt(example)) == "see you<|im_end|>" and examples.tally.answers_left_out.total() == 1


def test_prompt_and_completion_as_messages(tmp_path, kind):
    kind.chat_template, messages = STABLE["llama 3"], said("hi", "hello", "bye", "see you")
    (example,) = made(tmp_path, kind, {"prompt": messages[:3], "completion": messages[3:]})
    assert whole(example) == kind.apply_chat_template(messages, return_dict=False)
    assert kind.decode(learnt(example)).strip() == "see you<|im_end|>"


def test_content_in_parts_is_joined(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "user", "content": ["hi"]}, {"role": "assistant", "content": parts}]
    (example,) = made(tmp_path, bos, {"messages": messages})
    assert whole(example) == bos.apply_chat_template(said("hi", "hello"), return_dict=False)


# --- conversations that are too long ---------------------------------------------------------------------


def test_conversation_is_cut_at_a_turn_and_keeps_its_system_prompt(tmp_path, kind):
    kind.chat_template = STABLE["llama 3"]
    messages = said(("be kind",), "hi", "hello " * 30, "bye", "see you", "two", "three")
    left = [messages[0], *messages[3:]]
    context = len(kind.apply_chat_template(left, return_dict=False)) - 1  # so much fits to the token
    (example,) = examples = made(tmp_path, kind, {"messages": messages}, context=context)
    assert whole(example) == kind.apply_chat_template(left, return_dict=False)
    assert kind.decode(learnt(example)).replace(" ", "") == "seeyou<|im_end|>three<|im_end|>"
    total = len(kind.apply_chat_template(messages, return_dict=False))
    assert (examples.tally.cut, examples.tally.tokens_cut) == (1, total - context - 1)
    assert examples.tally.answers_left_out.total() == 1


def test_last_question_that_is_too_long_loses_its_beginning_behind_the_bos(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    (example,) = examples = made(tmp_path, bos, {"messages": said("hi", "hello", "far " * 90, "see you")}, context=60)
    assert len(example[0]) == 60 and example[0][0] == bos.bos_token_id != example[0][1]
    assert bos.decode(learnt(example)) == "see you<|im_end|>"
    assert examples.tally.cut == 1 and examples.tally.answers_left_out.total() == 1


def test_of_an_answer_that_is_cut_nothing_is_learnt(tmp_path, bos):
    bos.chat_template = STABLE["chatml"]
    messages = [*said("hi", "hello " * 70), {"role": "assistant", "content": "see you"}]  # one turn, two answers
    (example,) = made(tmp_path, bos, {"messages": messages}, context=60)
    assert bos.decode(learnt(example)) == "see you<|im_end|>\n"


def test_answer_longer_than_the_context_is_refused(tmp_path, bos):
    bos.chat_template = STABLE["chatml"]
    assert "its last answer has" in refusal(lambda: made(tmp_path, bos, {"messages": said("hi", "é" * 90)}, context=60))


def test_earlier_answer_longer_than_the_context_is_left_out(tmp_path, bos):
    bos.chat_template = REWRITING["thinking"]
    (example,) = examples = made(tmp_path, bos, {"messages": said("hi", "é" * 90, "bye", "see you")}, context=80)
    assert "see you" in bos.decode(learnt(example)) and examples.tally.answers_left_out.total() == 1
