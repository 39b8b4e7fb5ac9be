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


def test_examples_are_the_question_and_the_right_answer_of_which_the_answer_is_learnt(data, tokenizer):
    for row, (tokens, targets) in zip(ROWS, data, strict=True):
        answer = f" {row['sol2' if row['label'] else 'sol1']}"  # its leading space is tuned on
        assert tokenizer.decode([*tokens, targets[-1]]) == f"Question: {row['goal']}\nAnswer:{answer}"
        first = targets.count(IGNORED)
        assert tokenizer.decode(targets[first:]) == answer and targets[first:-1] == tokens[first + 1 :]


def test_question_that_is_too_long_loses_its_beginning_and_never_its_answer(tokenizer, capsys):
    examples = from_task(tiny_model("llama"), tokenizer, "piqa", [*ROWS, LONG], block_size=16)
    text = f"Question: {LONG['goal']}\nAnswer: {LONG['sol2']}"
    expected = tokenizer.encode(text)
    tokens, targets = examples[-1]
    assert len(expected) > 129 and [*tokens, targets[-1]] == expected[-129:]
    assert tokenizer.decode(targets[targets.count(IGNORED) :]) == f" {LONG['sol2']}"
    assert (examples.tally.records, examples.tally.cut, examples.tally.tokens_cut) == (10, 1, len(expected) - 129)
    assert "task piqa: 1 of 10 records are too long for the model's context of 128 tokens" in capsys.readouterr().err


def test_loss_is_the_one_that_lm_eval_gives_the_right_answer(tokenizer):
    model = tiny_model("llama")
    rows = [*ROWS, LONG]
    task = load_task("piqa", rows, rows)
    task.build_all_requests()
    right = {pair: row for row, pair in enumerate(answer_pairs(task, tokenizer, context_length=128))}
    requests = [request for request in task.instances if request.args in right]
    scored = lm(model, tokenizer, batch_size=4).loglikelihood(requests)
    examples = from_task(model, tokenizer, "piqa", rows, block_size=16)
    assert len(requests) == len(rows)
    for request, (log_likelihood, _) in zip(requests, scored, strict=True):
        inputs, targets = collate([examples[right[request.args]]])
        total = answer_loss(model, inputs, targets).item() * int((targets != IGNORED).sum())
        assert total == pytest.approx(-log_likelihood, rel=1e-5)


def test_generated_answer_ends_in_the_end_of_text(tokenizer):
    rows = [{"question": "1 + 1?", "answer": "2 #### 2"}, {"question": "2 + 1?", "answer": "3 #### 3"}]
    examples = from_task(tiny_model("llama"), tokenizer, "gsm8k", rows, block_size=16)
    for row, (tokens, targets) in zip(rows, examples, strict=True):
        assert tokenizer.decode(tokens) == f"Question: {row['question']}\nAnswer: {row['answer']}"
        answer = [target for target in targets if target != IGNORED]
        assert tokenizer.decode(answer) == f" {row['answer']}<eos>"


def test_every_token_of_a_text_is_a_target_once(tokenizer):
    pages = [{"page": "one page of some length"}, {"page": "another"}]
    examples = from_task(tiny_model("llama"), tokenizer, "wikitext", pages, block_size=8)
    joined = [token for row in pages for token in [*tokenizer(row["page"])["input_ids"], tokenizer.eos_token_id]]
    assert [token for tokens, _ in examples for token in tokens] == joined[:-1]
    assert [token for _, targets in examples for token in targets] == joined[1:]
    assert all(len(tokens) == 8 for tokens, _ in examples[:-1]) and 0 < len(examples[-1][0]) <= 8


def test_text_needs_an_end(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    message = refusal(lambda: from_task(tiny_model("llama"), without, "wikitext", [{"page": "a"}], block_size=8))
    assert "end-of-text token" in message


def test_no_questions_are_refused(tokenizer):
    assert "task piqa" in refusal(lambda: from_task(tiny_model("llama"), tokenizer, "piqa", [], block_size=16))


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


def from_texts(folder, tokenizer, *texts, **options):
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return from_file(tiny_model("llama"), tokenizer, folder / "texts.jsonl", **options)


def test_texts_not_packed_are_examples_of_their_own_as_long_as_lm_eval_has_them(tokenizer, tmp_path):
    examples = from_texts(tmp_path, tokenizer, "one", "two three", "far " * 100, block_size=16, packed=False)
    end, context = tokenizer.eos_token_id, lm(tiny_model("llama"), tokenizer).max_length
    assert [targets[-1] for _, targets in examples] == [end] * 3 and [len(t) for t, _ in examples] == [3, 9, context]
    assert examples[0] == (tokenizer.encode("one"), [*tokenizer.encode("one")[1:], end])


def test_packed_blocks_are_no_longer_than_the_context(tokenizer, tmp_path):
    examples = from_texts(tmp_path, tokenizer, "far " * 100, block_size=512)
    assert max(len(tokens) for tokens, _ in examples) == examples.block_size == 128
