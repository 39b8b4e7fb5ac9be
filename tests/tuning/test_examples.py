"""What tuning sees is what evaluation scores, and what the data owner's own records say."""

import copy
import json

import pytest
import torch
from helpers import piqa_rows, refusal, tiny_model

from scaleot_core.evaluation.harness import lm
from scaleot_core.evaluation.tasks import answer_pairs, load_task
from scaleot_core.tuning.examples import IGNORED, collate, from_file, from_task
from scaleot_core.tuning.tuner import answer_loss

ROWS = piqa_rows(9)
LONG = {**ROWS[1], "goal": "far " * 100}  # the context of the tiny models is 128 tokens, of about a character each


@pytest.fixture
def data(tokenizer):
    return from_task(tiny_model("llama"), tokenizer, "piqa", ROWS, block_size=16)


# --- what is tuned on ------------------------------------------------------------------------------------


def test_examples_are_the_tokens_that_lm_eval_scores(model, tokenizer):
    view = lm(model, tokenizer)
    for row, (tokens, targets) in zip(ROWS, from_task(model, tokenizer, "piqa", ROWS, block_size=16), strict=True):
        right = f" {row['sol2' if row['label'] else 'sol1']}"
        before, answer = view._encode_pair(f"Question: {row['goal']}\nAnswer:", right)
        assert tokenizer.decode(answer) == right  # its leading space is tuned on
        assert tokens == [*before, *answer][:-1]
        assert targets == [IGNORED] * (len(before) - 1) + answer


def test_question_that_is_too_long_loses_its_beginning_and_never_its_answer(model, tokenizer):
    ((tokens, targets),) = from_task(model, tokenizer, "piqa", [LONG], block_size=16)
    before, answer = lm(model, tokenizer)._encode_pair(f"Question: {LONG['goal']}\nAnswer:", f" {LONG['sol2']}")
    assert len(before) > 128 and len(tokens) == 128
    assert tokens == [*before, *answer][-129:-1]
    assert targets == [IGNORED] * (128 - len(answer)) + answer


def test_loss_is_the_one_that_lm_eval_gives_the_right_answer(model, tokenizer):
    rows = [*ROWS, LONG]
    task = load_task("piqa", rows, rows)
    task.build_all_requests()
    right = {pair: row for row, pair in enumerate(answer_pairs(task, tokenizer, context_length=128))}
    requests = [request for request in task.instances if request.args in right]
    scored = lm(model, tokenizer, batch_size=4).loglikelihood(requests)
    made = from_task(model, tokenizer, "piqa", rows, block_size=16)
    assert len(requests) == len(rows)
    for request, (log_likelihood, _) in zip(requests, scored, strict=True):
        inputs, targets = collate([made[right[request.args]]])
        total = answer_loss(model, inputs, targets).item() * int((targets != IGNORED).sum())
        assert total == pytest.approx(-log_likelihood, rel=1e-5)


def test_questions_that_are_cut_are_counted_and_said(tokenizer, capsys):
    made = from_task(tiny_model("llama"), tokenizer, "piqa", [*ROWS, LONG], block_size=16)
    before, answer = lm(tiny_model("llama"), tokenizer)._encode_pair(
        f"Question: {LONG['goal']}\nAnswer:", f" {LONG['sol2']}"
    )
    lost = len(before) + len(answer) - 129
    assert (made.tally.records, made.tally.cut, made.tally.tokens_cut) == (10, 1, lost)
    assert "task piqa: 1 of 10 records are too long for the model's context of 128 tokens" in capsys.readouterr().err


def test_context_of_own_records_is_that_of_lm_eval(model, tokenizer, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "a"}))
    made = from_file(model, tokenizer, tmp_path / "own.jsonl", block_size=8)
    assert made.tally.context_length == lm(model, tokenizer).max_length


def test_generated_answer_ends_in_the_end_of_text(tokenizer):
    rows = [{"question": "1 + 1?", "answer": "2 #### 2"}, {"question": "2 + 1?", "answer": "3 #### 3"}]
    made = from_task(tiny_model("llama"), tokenizer, "gsm8k", rows, block_size=16)
    for row, (tokens, targets) in zip(rows, made, strict=True):
        assert tokenizer.decode(tokens) == f"Question: {row['question']}\nAnswer: {row['answer']}"
        answer = [target for target in targets if target != IGNORED]
        assert tokenizer.decode(answer) == f" {row['answer']}<eos>"


def test_every_token_of_a_text_is_a_target_once(tokenizer):
    pages = [{"page": "one page of some length"}, {"page": "another"}]
    made = from_task(tiny_model("llama"), tokenizer, "wikitext", pages, block_size=8)
    joined = [token for row in pages for token in [*tokenizer(row["page"])["input_ids"], tokenizer.eos_token_id]]
    assert [token for tokens, _ in made for token in tokens] == joined[:-1]
    assert [token for _, targets in made for token in targets] == joined[1:]
    assert all(len(tokens) == 8 for tokens, _ in made[:-1]) and 0 < len(made[-1][0]) <= 8


def test_text_needs_an_end(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    said = refusal(lambda: from_task(tiny_model("llama"), without, "wikitext", [{"page": "a"}], block_size=8))
    assert "end-of-text token" in said


def test_no_questions_are_refused(tokenizer):
    assert "task piqa" in refusal(lambda: from_task(tiny_model("llama"), tokenizer, "piqa", [], block_size=16))


# --- the loss --------------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_right_with_nothing_to_learn():
    inputs, targets = collate([([7, 8, 9], [IGNORED, 5, 6]), ([4], [3])])
    assert inputs.tolist() == [[7, 8, 9], [4, 0, 0]]
    assert targets.tolist() == [[IGNORED, 5, 6], [3, IGNORED, IGNORED]]


def test_answer_loss_is_the_cross_entropy_of_the_answer_tokens_whatever_the_padding(model, data):
    total, count = 0.0, 0
    for tokens, targets in data:  # one at a time, unpadded, all logits
        logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for t, target in enumerate(targets):
            if target != IGNORED:
                total, count = total - logp[t, target].item(), count + 1
    batch = collate([*data, ([1] * 60, [IGNORED] * 60)])
    assert (batch[0] == 0).any()
    assert answer_loss(model, *batch).item() == pytest.approx(total / count, rel=1e-5)


def test_texts_not_packed_are_examples_of_their_own(tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two three", "far " * 100)))
    made = from_file(tiny_model("llama"), tokenizer, file, block_size=16, packed=False)
    end = tokenizer.eos_token_id
    assert [targets[-1] for _, targets in made] == [end] * 3 and [len(t) for t, _ in made] == [3, 9, 128]
    assert made[0] == (tokenizer.encode("one"), [*tokenizer.encode("one")[1:], end])


def test_packed_blocks_are_no_longer_than_the_context(tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "far " * 100}))
    made = from_file(tiny_model("llama"), tokenizer, file, block_size=512)
    assert max(len(tokens) for tokens, _ in made) == 128


# --- the data owner's own records ------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat(tokenizer):
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    return with_template


def records(folder, tokenizer, *rows, block_size=8):
    file = folder / "own.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return from_file(tiny_model("llama"), tokenizer, file, block_size=block_size)


def learnt(tokenizer, example):
    return tokenizer.decode([target for target in example[1] if target != IGNORED])


def test_completion_is_learnt_with_its_end(tmp_path, tokenizer):
    (example,) = records(tmp_path, tokenizer, {"prompt": "ask:", "completion": " answer"})
    assert tokenizer.decode(example[0]) == "ask: answer" and learnt(tokenizer, example) == " answer<eos>"


def test_every_message_of_the_assistant_is_learnt_in_the_models_own_template(tmp_path, chat):
    said = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    messages = [{"role": role, "content": content} for role, content in said]
    (example,) = records(tmp_path, chat, {"messages": messages})
    assert chat.decode([*example[0], example[1][-1]]) == chat.apply_chat_template(messages, tokenize=False)
    assert learnt(chat, example) == "hello</>see you</>"


def test_texts_are_packed(tmp_path, tokenizer):
    made = records(tmp_path, tokenizer, {"text": "one text"}, {"text": "and another"})
    assert tokenizer.decode([target for _, targets in made for target in targets]) == "ne text<eos>and another<eos>"
    assert all(len(tokens) == 8 for tokens, _ in made[:-1])


def test_record_that_is_too_long_loses_its_beginning(tmp_path, tokenizer):
    ((tokens, targets),) = records(tmp_path, tokenizer, {"prompt": "x" * 300, "completion": "the answer"})
    assert len(tokens) == 128 and learnt(tokenizer, (tokens, targets)) == "the answer<eos>"


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there is no record in it"),
        ([GOOD, "half"], "line 2: not valid JSON"),
        ([GOOD, {"question": "a"}], "line 2: it needs `completion` as in the lines before it"),
        ([{"question": "a"}], "line 1: it needs `prompt` and `completion`, `messages`, or `text`"),
        (
            [GOOD, {"text": "a"}],
            "line 2: it needs `completion` as in the lines before it; give all records of a file one",
        ),
        ([GOOD, {"completion": "a"}], "line 2: `prompt` is missing"),
        ([{"prompt": "a", "completion": " "}], "line 1: `completion` is missing, empty or no text"),
        ([{"prompt": 1, "completion": "b"}], "line 1: `prompt`"),
        (
            [{"prompt": "a", "completion": "b" * 200}],
            "line 1: its last answer has 201 tokens, the context 128; shorten",
        ),
        ([{"text": ""}], "line 1: `text`"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: there is nothing in it to learn"),
        ([{"messages": "a"}], "line 1: `messages` is a list"),
    ],
)
def test_record_that_is_of_no_use_is_named(tmp_path, chat, rows, said):
    assert said in refusal(records, tmp_path, chat, *rows)


def test_model_without_a_chat_template_is_told(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "no chat template" in refusal(records, tmp_path, tokenizer, {"messages": messages})


def test_template_that_forgets_is_refused(tmp_path, chat):
    chat.chat_template = "{{ messages[-1].content }}{% if add_generation_prompt %}?{% endif %}"
    messages = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    assert "doesn't keep what was said before" in refusal(records, tmp_path, chat, {"messages": messages})
