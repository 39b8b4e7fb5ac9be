"""A conversation is learnt in the tokens that the model sees when it is used, whatever its tokenizer and template."""

import pytest
from helpers import TEST_DATA, refusal
from private_records import HI, learnt, read, tokens_of, turns
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
    options = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"return_offsets_mapping": True}}
    encoded = marked.apply_chat_template(messages, return_dict=True, **options)
    mask, offsets = [bool(mark) for mark in encoded["assistant_masks"]], encoded["offset_mapping"]
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
        asked = kind.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
        assert tokens_of(example)[: len(asked)] == asked
        assert example[1][len(asked) - 2] == IGNORED != example[1][len(asked) - 1]


def test_no_bos_is_learnt_and_none_stands_twice(tmp_path, kind):
    for template in STABLE.values():
        kind.chat_template = template
        (example,) = read(tmp_path, kind, {"messages": CONVERSATIONS["several"]})
        text = kind.apply_chat_template(CONVERSATIONS["several"], tokenize=False)
        assert tokens_of(example).count(kind.bos_token_id) == text.count(kind.bos_token)
        assert kind.bos_token == kind.eos_token or kind.bos_token_id not in learnt(example)


def test_every_answer_is_learnt_with_the_end_of_its_turn(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    for more in ([], turns("bye")):  # what is said after the last answer is left out
        (example,) = read(tmp_path, bos, {"messages": CONVERSATIONS["several"] + more})
        assert tokens_of(example) == bos.apply_chat_template(CONVERSATIONS["several"], return_dict=False)
        assert bos.decode(learnt(example)) == "hello<|im_end|>see you<|im_end|>capital<|im_end|>"


@pytest.mark.slow
@pytest.mark.skipif(not (TEST_DATA / "tokenizers/gpt2").exists(), reason="GPT-2's tokenizer is not there")
def test_a_real_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TEST_DATA / "tokenizers/gpt2")
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
        bare, options = without_post_processor(kind), {"return_assistant_tokens_mask": True}
        encoded = bare.apply_chat_template(messages, return_dict=True, **options)
        assert example[0] == encoded["input_ids"][:-1] and sum(encoded["assistant_masks"]) > 0
        assert mask_of(example) == [mark == 1 for mark in encoded["assistant_masks"]]


MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}ANSWER<|im_end|>\n{% else %}"
    "OTHERS<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CONTENT = "{% generation %}{{ m.content }}{% endgeneration %}"


def test_end_of_a_turn_that_is_not_learnt_is_said(tmp_path, bos, capsys):
    bos.chat_template = MARKS.replace("ANSWER", MARKED_CONTENT).replace("OTHERS", "{{ m.content }}")
    (example,) = examples = read(tmp_path, bos, {"messages": turns("hi", "hello", "bye", "see you")})
    assert bos.decode(learnt(example)) == "hellosee you" and examples.tally.endless == 1
    assert "in 1 of 1 records no end of an answer is learnt" in capsys.readouterr().err
    bos.chat_template = STABLE["chatml"]
    assert read(tmp_path, bos, {"messages": HI}).tally.endless == 0


@pytest.mark.parametrize(
    "template",
    [
        MARKS.replace("ANSWER", MARKED_CONTENT).replace("OTHERS", MARKED_CONTENT),
        MARKS.replace("ANSWER", "{{ m.content }}").replace("OTHERS", MARKED_CONTENT),
        "{% generation %}" + STABLE["chatml"].replace("{% if add", "{% endgeneration %}{% if add"),
    ],
    ids=["user too", "user alone", "everything"],
)
def test_nothing_but_what_the_assistant_says_is_ever_learnt(tmp_path, bos, template):
    bos.chat_template = template
    for messages in (HI, turns(("be kind",), "hi", "hello", "bye", "see you")):
        assert "marks as the assistant's what others say" in refusal(read, tmp_path, bos, {"messages": messages})


def test_beginning_of_an_answer_that_is_not_marked_is_refused(tmp_path, bos):
    bos.chat_template = MARKS.replace("ANSWER", f"<think></think>{MARKED_CONTENT}").replace("OTHERS", "{{ m.content }}")
    assert "doesn't mark the beginning" in refusal(read, tmp_path, bos, {"messages": HI})


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("inline", [False, True])
def test_earlier_answers_are_learnt_with_the_thoughts_that_a_template_drops_later(tmp_path, bos, inline, marked):
    last = (
        "{{ m.content }}"
        if inline
        else "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    )
    answer = (
        f"«{{% if loop.index0 > ns.last %}}{last}{{% else %}}"
        "{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n»"
    )
    users = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    )
    template = users + MARKS.replace("ANSWER<|im_end|>\n", answer).replace("OTHERS", "{{ m.content }}")
    marks = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    bos.chat_template = template.replace("«", marks[0]).replace("»", marks[1])
    messages = turns("q1", "a1", "q2", "a2")
    for number, i in enumerate((1, 3), start=1):
        said = {"content": f"<think>r{number}</think>a{number}"} if inline else {"reasoning_content": f"r{number}"}
        messages[i] |= said
    examples = read(tmp_path, bos, {"messages": messages})
    assert [bos.decode(learnt(example)) for example in examples] == [
        f"<think>r{number}</think>a{number}<|im_end|>\n" for number in (1, 2)
    ]
    for i, example in zip((1, 3), examples, strict=True):
        prompt = bos.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
        assert tokens_of(example)[: len(prompt)] == prompt


@pytest.mark.parametrize("template", REWRITING)
def test_answers_that_a_template_rewrites_are_learnt_as_in_use(tmp_path, kind, template):
    kind.chat_template, messages = REWRITING[template], CONVERSATIONS["system"]
    examples = read(tmp_path, kind, {"messages": messages})
    assert list(examples.origins) == [0, 0] and examples.tally.records == 1
    for i, example in zip((2, 4), examples, strict=True):
        assert tokens_of(example) == kind.apply_chat_template(messages[: i + 1], return_dict=False)
        asked = kind.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        text = kind.apply_chat_template(messages[: i + 1], tokenize=False)
        encoded = without_post_processor(kind)(text, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        answer = [t for t, end in zip(encoded["input_ids"], ends, strict=True) if end > len(asked)]
        assert kind.decode(learnt(example)).strip() == kind.decode(answer).strip()


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
    more = [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "you"}]
    first, second = read(tmp_path, bos, {"messages": turns("hi", "hello", "bye", "see") + more})
    end = "<|im_end|>\n"
    assert bos.decode(learnt(first)) == f"<think>\n\n</think>\n\nhello{end}"
    assert bos.decode(learnt(second)) == f"<think>\n\n</think>\n\nsee{end}<think>\n\n</think>\n\nyou{end}"


def test_template_that_asks_otherwise_than_it_renders_is_refused(tmp_path, bos):
    bos.chat_template = STABLE["chatml"].replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    error = refusal(read, tmp_path, bos, {"messages": turns("hi", "hello")})
    assert "line 1: message 2 (assistant): the model's chat template doesn't keep" in error
    assert r"'<think>\n' goes" in error


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
