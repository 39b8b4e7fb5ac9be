"""A conversation is learnt in the tokens that the model sees when it is used, whatever its tokenizer and template."""

import pytest
from helpers import TEST_DATA, refusal
from private_records import learnt, read, tokens_of, turns
from tokenizer_kinds import MARKED, REWRITING, STABLE
from transformers import AutoTokenizer

from scaleot_core.records.encoding import without_post_processor
from scaleot_core.tuning.examples import IGNORED

CONVERSATIONS = {
    "one turn": turns("hi", "hello there"),
    "several": turns("hi", "hello", "bye", "see you", "the cap", "capital"),
    "system": turns(("be kind",), "hi", "hello", "bye", "see you"),
    "blanks and others": turns("  hi ", " hello\n\n", "é 😀", "naïve 😀"),
}


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
    error = marked.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    mask, offsets = [bool(mark) for mark in error["assistant_masks"]], error["offset_mapping"]
    for k in range(1, len(mask)):
        mask[k] = mask[k] or (mask[k - 1] and offsets[k][0] < offsets[k - 1][1])
    return mask


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", STABLE)
def test_tokens_are_those_of_the_whole_conversation_and_of_what_is_asked_in_use(tmp_path, kind, template, messages):
    kind.chat_template = STABLE[template]
    (example,) = read(tmp_path, kind, {"messages": messages})
    assert tokens_of(example) == kind.apply_chat_template(messages, return_dict=False)
    assert mask_of(example) == reference(kind, MARKED[template], messages)


@pytest.mark.parametrize("template", ["chatml", "default system"])  # in them no token is partly of an answer
def test_each_answer_stands_behind_exactly_what_the_model_is_given(tmp_path, kind, template):
    kind.chat_template, messages = STABLE[template], CONVERSATIONS["system"]
    (example,) = read(tmp_path, kind, {"messages": messages})
    for i in (2, 4):
        given = in_use(kind, messages[:i])
        assert tokens_of(example)[: len(given)] == given
        assert example[1][len(given) - 2] == IGNORED != example[1][len(given) - 1]


def test_no_bos_is_learnt_and_none_stands_twice(tmp_path, kind):
    for template in STABLE.values():
        kind.chat_template = template
        (example,) = read(tmp_path, kind, {"messages": CONVERSATIONS["several"]})
        text = kind.apply_chat_template(CONVERSATIONS["several"], tokenize=False)
        assert tokens_of(example).count(kind.bos_token_id) == text.count(kind.bos_token)
        assert kind.bos_token == kind.eos_token or kind.bos_token_id not in learnt(example)


def test_every_answer_is_learnt_with_the_end_of_its_turn(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    (example,) = read(tmp_path, bos, {"messages": CONVERSATIONS["several"]})
    assert bos.decode(learnt(example)) == "hello<|im_end|>see you<|im_end|>capital<|im_end|>"


def test_what_is_said_after_the_last_answer_is_left_out(tmp_path, bos):
    bos.chat_template, messages = STABLE["llama 3"], turns("hi", "hello", "bye")
    (example,) = read(tmp_path, bos, {"messages": messages})
    assert tokens_of(example) == bos.apply_chat_template(messages[:2], return_dict=False)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["gpt2"])
def test_a_real_tokenizer(tmp_path, folder):
    if not (TEST_DATA / "tokenizers" / folder).exists():
        pytest.skip(f"{TEST_DATA / 'tokenizers' / folder} is not there")
    tokenizer = AutoTokenizer.from_pretrained(TEST_DATA / "tokenizers" / folder)
    for template, text in STABLE.items():
        tokenizer.chat_template = text
        for messages in CONVERSATIONS.values():
            (example,) = read(tmp_path, tokenizer, {"messages": messages})
            assert tokens_of(example) == tokenizer.apply_chat_template(messages, return_dict=False)
            assert mask_of(example) == reference(tokenizer, MARKED[template], messages)


@pytest.mark.parametrize("template", MARKED)
def test_marks_of_the_template_say_what_is_learnt(tmp_path, kind, template):
    kind.chat_template = MARKED[template]
    for messages in CONVERSATIONS.values():
        (example,) = read(tmp_path, kind, {"messages": messages})
        error = without_post_processor(kind).apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert example[0] == error["input_ids"][:-1] and sum(error["assistant_masks"]) > 0
        assert mask_of(example) == [mark == 1 for mark in error["assistant_masks"]]


def test_marks_may_leave_out_the_end_of_a_turn_or_take_in_more(tmp_path, bos):
    bos.chat_template = (
        "{% for m in messages %}{{ m.role + '\n' }}{% generation %}{{ m.content }}{% endgeneration %}"
        "<|im_end|>{% endfor %}"
    )
    (example,) = read(tmp_path, bos, {"messages": turns("hi", "hello")})
    assert bos.decode(learnt(example)) == "hihello"  # the template says so of the user too


@pytest.mark.parametrize("template", REWRITING)
def test_answers_that_a_template_rewrites_are_learnt_as_in_use(tmp_path, kind, template):
    kind.chat_template, messages = REWRITING[template], CONVERSATIONS["system"]
    examples = read(tmp_path, kind, {"messages": messages})
    assert list(examples.origins) == [0, 0] and examples.tally.records == 1
    for i, example in zip((2, 4), examples, strict=True):
        assert tokens_of(example) == kind.apply_chat_template(messages[: i + 1], return_dict=False)
        text, asked = (
            kind.apply_chat_template(messages[: i + 1], tokenize=False),
            kind.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True),
        )
        assert kind.decode(learnt(example)).strip() == kind.decode(_tail(kind, text, len(asked))).strip()


def _tail(tokenizer, text, start):
    """Tokens of a text from a character on, one that it shares with what is before included."""
    error = without_post_processor(tokenizer)(text, return_offsets_mapping=True)
    return [t for t, (_, end) in zip(error["input_ids"], error["offset_mapping"], strict=True) if end > start]


def test_thinking_is_learnt_where_the_model_will_think(tmp_path, bos):
    bos.chat_template = REWRITING["thinking"]
    messages = turns("hi", "hello", "bye", "see you")
    messages[3]["reasoning_content"] = "the answer"
    first, second = read(tmp_path, bos, {"messages": messages})
    assert bos.decode(learnt(first)) == "<think>\n\n</think>\n\nhello<|im_end|>\n"
    assert bos.decode(learnt(second)) == "<think>\nthe answer\n</think>\n\nsee you<|im_end|>\n"
    assert "<think>" not in bos.decode(tokens_of(second)).split("bye")[0]


def test_answers_after_the_last_question_are_one_example(tmp_path, bos):
    bos.chat_template = REWRITING["thinking"]
    messages = [
        *turns("hi", "hello", "bye", "see"),
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "you"},
    ]
    first, second = read(tmp_path, bos, {"messages": messages})
    end = "<|im_end|>\n"
    assert bos.decode(learnt(first)) == f"<think>\n\n</think>\n\nhello{end}"
    assert bos.decode(learnt(second)) == f"<think>\n\n</think>\n\nsee{end}<think>\n\n</think>\n\nyou{end}"


def test_template_that_asks_otherwise_than_it_renders_is_refused(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    error = refusal(read, tmp_path, bos, {"messages": turns("hi", "hello")})
    assert (
        "line 1: message 2 (assistant): the model's chat template doesn't keep" in error
        and r"'<think>\n' goes" in error
    )


@pytest.mark.parametrize("templates", [STABLE, MARKED], ids=["", "marked"])
@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_answer_that_is_switched_off_is_read_and_not_learnt(tmp_path, kind, switch, templates):
    kind.chat_template, messages = templates["llama 3"], turns("hi", "hello", "bye", "see you")
    messages[1] |= switch
    messages[3] |= {"weight": 1}
    (example,) = examples = read(tmp_path, kind, {"messages": messages})
    assert tokens_of(example) == kind.apply_chat_template(turns("hi", "hello", "bye", "see you"), return_dict=False)
    assert kind.decode(learnt(example)).strip() == "see you<|im_end|>"
    assert examples.tally.switched_off == 1 and examples.tally.answers_left_out == {}


def test_what_no_one_asked_for_is_read_and_not_learnt(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    messages = [{"role": "assistant", "content": "hello"}, *turns("hi", "see you")]
    (example,) = examples = read(tmp_path, bos, {"messages": messages})
    assert tokens_of(example) == bos.apply_chat_template(messages, return_dict=False)
    assert bos.decode(learnt(example)) == "see you<|im_end|>" and examples.tally.answers_left_out.total() == 1
