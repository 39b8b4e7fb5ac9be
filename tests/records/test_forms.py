"""Every form of a record that people have is read as they mean it, or refused in a line that says what to do."""

import json

import pytest
from helpers import refusal
from private_records import HI, PAIR, learnt, read, tokens_of, turns
from tokenizer_kinds import STABLE, TOOLS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "messages": HI}, "it has `messages` and `text`, which are two forms of a record; keep one"),
        ({**PAIR, "text": "a"}, "it has `completion`, `prompt` and `text`"),
        ({"prompt": "a", "messages": HI}, "it has `prompt` and `messages`"),
        (
            {"conversations": [{"from": "human", "value": "hi"}]},
            "this is ShareGPT's form; rename `conversations` to `messages`, `from` to `role` (human is user, gpt is",
        ),
        ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 has no `role`; this is ShareGPT's form"),
        ({"conversations": HI}, "rename `conversations` to `messages`"),
        (
            {"instruction": "a", "input": "", "output": "b"},
            "Alpaca's form; write `messages`, for the model's chat template, or `p",
        ),
        ({"mesages": HI}, "is `mesages` meant for `messages`?"),
        ({"promt": "a", "completoin": "b"}, "is `promt` meant for `prompt`?; is `completoin` meant for `completion`?"),
        ({"question": "a", "answer": "b"}, "is `question` meant for `prompt`?; is `answer` meant for `completion`?"),
        ({"prompt": "a", "response": "b"}, "`completion` is missing, empty or no text; is `response` meant"),
        ({"prompt": "a", "completions": "b"}, "is `completions` meant for `completion`?"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "`chosen` stands beside `completion`, and would be lost: pref",
        ),
        ({"chosen": HI, "rejected": HI}, "preferences can't be learnt"),
        ({**PAIR, "label": False}, "`label` = False can't be heeded"),
        ({**PAIR, "weight": 0}, "`weight` = 0 can't be heeded"),
        ({**PAIR, "system": "be kind"}, "`system` stands beside `completion`, and would be lost"),
        ({"messages": HI, "system": "be kind"}, "put it into `messages` as the first one"),
        ({**PAIR, "tools": [{"type": "function"}]}, "they go with `messages`"),
        ({**PAIR, "suffix": "a"}, "`suffix` stands beside"),
        ({"messages": HI, "images": ["a.png"]}, "text alone can be learnt"),
        ({"messages": HI, "functions": [{"name": "f"}]}, "write them as `tools`"),
        ({"messages": HI, "tools": "add"}, "`tools` is a text that isn't JSON"),
        ({"messages": HI, "tools": {"name": "f"}}, "`tools` is a list of objects"),
        ({"messages": HI, "chat_template_kwargs": [1]}, "`chat_template_kwargs` is an object"),
        ({"prompt": HI[:1], "completion": "b"}, "`prompt` and `completion` are both lists"),
        ({"prompt": "a", "completion": HI[1:]}, "`prompt` and `completion` are both lists"),
        ({"prompt": [], "completion": HI[1:]}, "nothing comes before what the assistant says"),
        ({"prompt": HI, "completion": HI[:1]}, "there is nothing in it to learn"),
    ],
)
def test_form_that_cannot_be_meant_is_refused_in_a_line_that_helps(tmp_path, bos, row, message):
    error = refusal(read, tmp_path, bos, row)
    assert error.startswith(f"{tmp_path / 'own.jsonl'}, line 1: ") and message in error


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ({}, "`messages` is a list of objects with `role` and `content`"),
        (["hi"], "message 1 is a str; an object with `role` and `content` is needed"),
        ([{"content": "hi"}], "message 1 has no `role`"),
        ([{"rol": "user", "content": "hi"}], "message 1 has no `role`; is `rol` meant for `role`?"),
        ([{"role": "user"}], "message 1 (user) has no `content`"),
        ([{"role": "user", "contents": "hi"}], "message 1 (user) has no `content`; is `contents` meant for `content`?"),
        ([{"role": "user", "content": None}, HI[1]], "message 1 (user) has no `content`"),
        ([HI[0], {"role": "assistant", "content": None}], "message 2 (assistant) has no `content`"),
        ([HI[0], {"role": "assistant", "content": " "}], "message 2 (assistant) is empty; write the answer, "),
        ([HI[0], {"role": "assistant", "content": 7}], "message 2 (assistant): its `content` is a int"),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}]},
                HI[1],
            ],
            "message 1 (user): part 2 of its `content` is of type 'image_url'; text alone can be learnt",
        ),
        ([{"role": "human", "content": "hi"}, HI[1]], "message 1: the role `human` is not known; write `user`"),
        ([HI[0], {"role": "gpt", "content": "a"}], "message 2: the role `gpt` is not known; write `assistant`"),
        (
            [HI[0], {"role": "Assistant", "content": "a"}],
            "message 2: the role `Assistant` is not known; write `assistant`",
        ),
        ([HI[0], {"role": "assistnat", "content": "a"}], "the role `assistnat` is not known; write `assistant`"),
        ([{"role": "narrator", "content": "hi"}, HI[1]], "the role `narrator` is not known; roles are system, "),
        (HI[:1], "no message has the role `assistant`"),
        ([HI[0], {**HI[1], "weight": 0}], "every answer is switched off"),
    ],
)
def test_message_that_cannot_be_meant_is_named(tmp_path, bos, messages, message):
    error = refusal(read, tmp_path, bos, {"messages": messages})
    assert error.startswith(f"{tmp_path / 'own.jsonl'}, line 1: ") and message in error


@pytest.mark.parametrize("switch", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"train_detail": []}])
def test_switch_that_cannot_be_heeded_is_refused(tmp_path, bos, switch):
    bos.chat_template, messages = STABLE["llama 3"], turns("hi", "hello")
    messages[1] |= switch
    assert f"message 2 (assistant): `{next(iter(switch))}`" in refusal(read, tmp_path, bos, {"messages": messages})


@pytest.mark.parametrize(
    "row", [{**PAIR, "text": None}, {**PAIR, "messages": None, "tools": []}, {**PAIR, "system": None, "images": []}]
)
def test_field_that_says_nothing_is_not_there(tmp_path, bos, row):
    assert bos.decode(learnt(read(tmp_path, bos, row)[0])) == " hello</s>"


def test_prompt_that_repeats_a_message_is_that_message(tmp_path, bos):
    (example,) = examples = read(tmp_path, bos, {"prompt": "hi", "prompt_id": "7", "messages": HI})  # as UltraChat's
    assert bos.decode(learnt(example)) == "hello<|im_end|>\n" and examples.tally.ignored == {
        "prompt": 1,
        "prompt_id": 1,
    }


def test_prompt_and_completion_as_messages(tmp_path, kind):
    kind.chat_template, messages = STABLE["llama 3"], turns("hi", "hello", "bye", "see you")
    (example,) = read(tmp_path, kind, {"prompt": messages[:3], "completion": messages[3:]})
    assert tokens_of(example) == kind.apply_chat_template(messages, return_dict=False)
    assert kind.decode(learnt(example)).strip() == "see you<|im_end|>"


def test_content_in_parts_is_joined(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "user", "content": ["hi"]}, {"role": "assistant", "content": parts}]
    (example,) = read(tmp_path, bos, {"messages": messages})
    assert tokens_of(example) == bos.apply_chat_template(turns("hi", "hello"), return_dict=False)


def test_messages_may_come_as_json_in_a_text(tmp_path, bos):
    plain, text = (read(tmp_path, bos, {"messages": messages}) for messages in (HI, json.dumps(HI)))
    assert plain == text


@pytest.mark.parametrize(
    ("row", "said"),
    [({**PAIR, "text": ""}, " hello</s>"), ({"messages": HI, "prompt": "", "completion": ""}, "hello<|im_end|>\n")],
)
def test_empty_cell_of_another_form_says_nothing(tmp_path, bos, row, said):
    assert bos.decode(learnt(read(tmp_path, bos, row)[0])) == said


def test_null_fields_of_tools_and_calls_are_not_there(tmp_path, bos):
    bos.chat_template = TOOLS
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}
    padded = {
        "type": "function",
        "x": None,
        "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": None}}},
    }
    rows = [{"messages": HI, "tools": [t]} for t in (tool, padded)]
    plain, nulls = (read(tmp_path, bos, row) for row in rows)
    assert plain == nulls
