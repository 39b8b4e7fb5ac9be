"""What is too long for the context loses its oldest part, and what was lost is counted."""

from helpers import refusal
from private_records import PAIR, learnt, read, tokens_of, turns
from tokenizer_kinds import REWRITING, STABLE


def test_conversation_is_cut_at_a_turn_and_keeps_its_system_prompt(tmp_path, kind):
    kind.chat_template = STABLE["llama 3"]
    messages = turns(("be kind",), "hi", "hello " * 30, "bye", "see you", "two", "three")
    left = [messages[0], *messages[3:]]
    context = len(kind.apply_chat_template(left, return_dict=False)) - 1  # so much fits to the token
    (example,) = examples = read(tmp_path, kind, {"messages": messages}, context=context)
    assert tokens_of(example) == kind.apply_chat_template(left, return_dict=False)
    assert kind.decode(learnt(example)).replace(" ", "") == "seeyou<|im_end|>three<|im_end|>"
    total = len(kind.apply_chat_template(messages, return_dict=False))
    assert (examples.tally.cut, examples.tally.tokens_cut) == (1, total - context - 1)
    assert examples.tally.answers_left_out.total() == 1


def test_last_question_that_is_too_long_loses_its_beginning_behind_the_bos(tmp_path, bos):
    bos.chat_template = STABLE["llama 3"]
    (example,) = examples = read(tmp_path, bos, {"messages": turns("hi", "hello", "far " * 90, "see you")}, context=60)
    assert len(example[0]) == 60 and example[0][0] == bos.bos_token_id != example[0][1]
    assert bos.decode(learnt(example)) == "see you<|im_end|>"
    assert examples.tally.cut == 1 and examples.tally.answers_left_out.total() == 1


def test_of_an_answer_that_is_cut_nothing_is_learnt(tmp_path, bos):
    messages = [*turns("hi", "hello " * 70), {"role": "assistant", "content": "see you"}]  # one turn, two answers
    (example,) = read(tmp_path, bos, {"messages": messages}, context=60)
    assert bos.decode(learnt(example)) == "see you<|im_end|>\n"


def test_answer_longer_than_the_context_is_refused(tmp_path, bos):
    row = {"messages": turns("hi", "é" * 90)}
    assert "its last answer has" in refusal(lambda: read(tmp_path, bos, row, context=60))


def test_earlier_answer_longer_than_the_context_is_left_out(tmp_path, bos):
    bos.chat_template = REWRITING["thinking"]
    (example,) = examples = read(tmp_path, bos, {"messages": turns("hi", "é" * 90, "bye", "see you")}, context=80)
    assert "see you" in bos.decode(learnt(example)) and examples.tally.answers_left_out.total() == 1


def test_privacy_takes_one_example_a_record_and_says_what_that_costs(tmp_path, bos):
    bos.chat_template, messages = REWRITING["thinking"], turns("hi", "hello", "bye", "see you")
    (example,) = private = read(tmp_path, bos, {"messages": messages}, packed=False)
    assert tokens_of(example) == bos.apply_chat_template(messages, return_dict=False)
    assert private.tally.answers_left_out.total() == 1


def test_prompt_that_is_too_long_loses_its_beginning_but_for_its_bos_and_is_counted(tmp_path, bos):
    examples = read(tmp_path, bos, {"prompt": "far " * 200, "completion": "hello"}, PAIR, context=128)
    assert len(examples[0][0]) == 128 and examples[0][0][0] == bos.bos_token_id
    assert bos.decode(learnt(examples[0])) == "hello</s>"
    full = len(bos("far " * 200)["input_ids"]) + len(learnt(examples[0]))
    assert (examples.tally.records, examples.tally.cut, examples.tally.tokens_cut) == (2, 1, full - 129)


def test_texts_are_cut_and_counted_where_they_are_not_packed(tmp_path, bos):
    texts = [{"text": "é" * 300}, {"text": "hi"}]
    assert read(tmp_path, bos, *texts, packed=False, context=128).tally.cut == 1
    packed = read(tmp_path, bos, *texts, context=128)
    assert packed.tally.cut == 0 and packed.tally.records == 2 and packed.block_size == 64
