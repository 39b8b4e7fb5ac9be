"""Every form of a record that people have is read as they mean it, or refused in a line that says what to do."""

import copy
import json

import pytest
from helpers import refusal, tiny_model
from tokenizer_kinds import KINDS, STABLE

from scaleot_core.tuning.examples import IGNORED, from_file

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
PAIR = {"prompt": "hi", "completion": " hello"}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: build() for kind, build in KINDS.items()}


@pytest.fixture(params=sorted(KINDS))
def kind(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture
def bos(tokenizers):
    found = copy.deepcopy(tokenizers["bos"])
    found.chat_template = STABLE["chatml"]
    return found


def made(folder, tokenizer, *rows, block_size=64, packed=True, context=128):
    file = folder / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    model = tiny_model("llama", vocab_size=max(300, len(tokenizer)), max_position_embeddings=context)
    return from_file(model, tokenizer, file, block_size=block_size, packed=packed)


def whole(example):
    return [*example[0], example[1][-1]]


def learnt(example):
    return [target for target in example[1] if target != IGNORED]


def given(tokenizer, prompt):
    """The tokens of a prompt as the model gets it in use, and as it does where an EOS isn't put behind every text."""
    tokens = tokenizer(prompt)["input_ids"]
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else tokens


# --- prompt and completion -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("hi", " hello there"),
        ("the cap", "ital"),  # one word, whose pieces join
        ("1+1", "1+1?"),
        ("the answer is ", "two"),  # as prompts often end
        ("hi\n\n", "hello"),
        ("hi\n", "\nhello"),
        ("hi", "\nhello"),
        ("é 😀", "😀 é"),
        ("  ", "hello"),
        ("hi", "   hello"),
    ],
)
def test_prompt_has_the_tokens_of_use_and_all_of_the_completion_is_learnt(tmp_path, kind, prompt, completion):
    (example,) = made(tmp_path, kind, {"prompt": prompt, "completion": completion})
    before = given(kind, prompt)
    assert whole(example)[: len(before)] == before and learnt(example) == whole(example)[len(before) :]
    assert learnt(example)[-1] == kind.eos_token_id and kind.eos_token_id not in learnt(example)[:-1]
    text = kind.decode([token for token in whole(example)[:-1] if token not in (kind.bos_token_id, kind.eos_token_id)])
    assert text.strip() == f"{prompt}{completion}".strip()
    assert len(learnt(example)) > 1 and kind.decode(learnt(example)[:-1]).strip() in completion


def test_empty_prompt_is_what_a_text_begins_with(tmp_path, kind):
    (example,) = made(tmp_path, kind, {"prompt": "", "completion": "hello there"})
    assert example[0][0] == (kind.eos_token_id if kind.bos_token_id is None else kind.bos_token_id)
    assert IGNORED not in example[1] and kind.decode(learnt(example)).strip() == "hello there</s>"


@pytest.mark.parametrize("end", ["</s>", "</s>\n", " </s></s>", "</s> \n</s>"])
def test_one_end_is_learnt_where_the_record_brings_its_own(tmp_path, kind, end):
    for row in ({"prompt": "hi", "completion": f" hello{end}"}, {"text": f"hi hello{end}"}):
        (example,) = made(tmp_path, kind, row)
        assert whole(example).count(kind.eos_token_id) == 1 + (kind.bos_token == kind.eos_token)
        assert whole(example)[-1] == kind.eos_token_id


@pytest.mark.parametrize("text", ["<s>[INST] hi [/INST] hello </s>", "<s>hi"])
def test_no_second_bos_stands_before_a_text_that_has_one(tmp_path, kind, text):
    for row in ({"text": text}, {"prompt": text, "completion": " hello"}):
        (example,) = made(tmp_path, kind, row)
        assert whole(example).count(kind.convert_tokens_to_ids("<s>")) == 1


@pytest.mark.parametrize("completion", ["</s>", " </s>\n"])
def test_completion_that_says_nothing_is_refused(tmp_path, kind, completion):
    assert "line 1: there is nothing in it to learn" in refusal(
        made, tmp_path, kind, {"prompt": "hi", "completion": completion}
    )


def test_completion_without_a_token_of_its_own_is_refused(tmp_path, tokenizers):
    from tokenizers import normalizers

    deaf = copy.deepcopy(tokenizers["bare"])
    deaf.backend_tokenizer.normalizer = normalizers.Replace("☎", "")
    assert "nothing in it to learn" in refusal(made, tmp_path, deaf, {"prompt": "hi", "completion": "☎"})
    assert "nothing in it to learn" in refusal(made, tmp_path, deaf, {"text": "☎"})


def test_prompt_that_is_too_long_loses_its_beginning_but_for_its_bos_and_is_counted(tmp_path, bos):
    examples = made(tmp_path, bos, {"prompt": "far " * 200, "completion": "hello"}, PAIR)
    assert len(examples[0][0]) == 128 and examples[0][0][0] == bos.bos_token_id
    assert bos.decode(learnt(examples[0])) == "hello</s>"
    full = len(bos("far " * 200)["input_ids"]) + len(learnt(examples[0]))
    assert (examples.tally.records, examples.tally.cut, examples.tally.tokens_cut) == (2, 1, full - 129)


def test_what_is_cut_is_said(tmp_path, bos, capsys):
    made(tmp_path, bos, {"prompt": "é" * 300, "completion": "hello"}, PAIR)
    assert "own.jsonl: 1 of 2 records are too long for the model's context of 128 tokens" in capsys.readouterr().err


def test_texts_are_cut_and_counted_where_they_are_not_packed(tmp_path, bos):
    texts = [{"text": "é" * 300}, {"text": "hi"}]
    assert made(tmp_path, bos, *texts, packed=False).tally.cut == 1
    packed = made(tmp_path, bos, *texts)
    assert packed.tally.cut == 0 and packed.tally.records == 2 and packed.are_blocks


# --- which form a record is of ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
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
def test_form_that_cannot_be_meant_is_refused_in_a_line_that_helps(tmp_path, bos, row, said):
    found = refusal(made, tmp_path, bos, row)
    assert found.startswith(f"{tmp_path / 'own.jsonl'}, line 1: ") and said in found


@pytest.mark.parametrize(
    ("messages", "said"),
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
def test_message_that_cannot_be_meant_is_named(tmp_path, bos, messages, said):
    found = refusal(made, tmp_path, bos, {"messages": messages})
    assert found.startswith(f"{tmp_path / 'own.jsonl'}, line 1: ") and said in found


def test_role_that_the_template_knows_is_taken(tmp_path, bos):
    bos.chat_template = "{% if messages[0].role == 'narrator' %}{% endif %}" + STABLE["chatml"]
    (example,) = made(tmp_path, bos, {"messages": [{"role": "narrator", "content": "once"}, *HI]})
    assert "narrator" in bos.decode(example[0])


def test_template_that_refuses_is_quoted(tmp_path, bos):
    bos.chat_template = STABLE["llama 2"]
    found = refusal(made, tmp_path, bos, {"messages": [HI[0], *HI]})
    assert "line 1: the model's chat template refuses it (roles must alternate)" in found


@pytest.mark.parametrize(
    "row", [{**PAIR, "text": None}, {**PAIR, "messages": None, "tools": []}, {**PAIR, "system": None, "images": []}]
)
def test_field_that_says_nothing_is_not_there(tmp_path, bos, row):
    assert bos.decode(learnt(made(tmp_path, bos, row)[0])) == " hello</s>"


def test_prompt_that_repeats_a_message_is_that_message(tmp_path, bos):
    (example,) = examples = made(tmp_path, bos, {"prompt": "hi", "prompt_id": "7", "messages": HI})  # as UltraChat's
    assert bos.decode(learnt(example)) == "hello<|im_end|>\n" and examples.tally.ignored == {
        "prompt": 1,
        "prompt_id": 1,
    }


def test_fields_that_are_not_read_are_told(tmp_path, bos, capsys):
    named = [{**HI[0], "name": "Ann"}, HI[1]]
    examples = made(tmp_path, bos, {"messages": HI, "id": 1}, {"messages": named, "id": 2, "source": "a"})
    assert examples.tally.ignored == {"id": 2, "source": 1, "messages: name": 1}
    assert "fields that are not read" in capsys.readouterr().err
    bos.chat_template = STABLE["chatml"].replace("{{ m.role }}", "{{ m.role }}{{ m.name }}")
    assert made(tmp_path, bos, {"messages": named}).tally.ignored == {}


def test_records_that_are_cut_are_named(tmp_path, bos, capsys):
    far = {"prompt": "far " * 200, "completion": "hello"}
    examples = made(tmp_path, bos, PAIR, far, *[PAIR, far] * 6)
    assert examples.tally.cut == 7
    assert "(line 2, line 4, line 6, line 8, line 10 and 2 more)" in capsys.readouterr().err


def test_prompt_that_goes_by_the_chat_template_is_told_once(tmp_path, bos, capsys):
    made(tmp_path, bos, PAIR, PAIR)
    assert capsys.readouterr().err.count("without the model's chat template") == 1
    made(tmp_path, bos, {"messages": HI})
    bos.chat_template = None
    made(tmp_path, bos, PAIR)
    assert "chat template" not in capsys.readouterr().err
    said = refusal(made, tmp_path, bos, {"instruction": "a", "input": "", "output": "b"})
    assert "this is Alpaca's form; write `prompt`" in said


def test_template_in_the_sandbox_reaches_nothing(tmp_path, bos):
    bos.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + STABLE["chatml"]
    assert "the model's chat template refuses it (access to attribute" in refusal(made, tmp_path, bos, {"messages": HI})
