"""Tuning sees what evaluation scores, moves what it is given, and stops where it should."""

import copy
import math

import pytest
import torch
from conftest import CONFIGS, piqa_rows, tiny_model
from test_dlr import weights_hash
from test_emulator import PLAN, emulator_of
from test_files import refusal

from scaleot_core import tuning
from scaleot_core.emulator import layer_parameters
from scaleot_core.evaluation import lm
from scaleot_core.runtime import generator
from scaleot_core.tasks import answer_pairs, load_task
from scaleot_core.training import Checkpoint, Diverged
from scaleot_core.tuning import IGNORED, answer_loss, choose_rate, collate, epoch_batches, examples, tune

ROWS = piqa_rows(9)
LONG = {**ROWS[1], "goal": "far " * 100}  # the context of the tiny models is 128 tokens, of about a character each


@pytest.fixture
def data(tokenizer):
    return examples(tiny_model("llama"), tokenizer, "piqa", ROWS, block_size=16)


@pytest.fixture
def settings(params):
    return params.tuning.model_copy(update={"epochs": 3, "batch_size": 4, "max_steps": 0})


# --- what is tuned on ------------------------------------------------------------------------------------


def test_examples_are_the_tokens_that_lm_eval_scores(model, tokenizer):
    view = lm(model, tokenizer)
    for row, (tokens, targets) in zip(ROWS, examples(model, tokenizer, "piqa", ROWS, block_size=16), strict=True):
        right = f" {row['sol2' if row['label'] else 'sol1']}"
        before, answer = view._encode_pair(f"Question: {row['goal']}\nAnswer:", right)
        assert tokenizer.decode(answer) == right  # its leading space is tuned on
        assert tokens == [*before, *answer][:-1]
        assert targets == [IGNORED] * (len(before) - 1) + answer


def test_question_that_is_too_long_loses_its_beginning_and_never_its_answer(model, tokenizer):
    ((tokens, targets),) = examples(model, tokenizer, "piqa", [LONG], block_size=16)
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
    made = examples(model, tokenizer, "piqa", rows, block_size=16)
    assert len(requests) == len(rows)
    for request, (log_likelihood, _) in zip(requests, scored, strict=True):
        inputs, targets = collate([made[right[request.args]]])
        total = answer_loss(model, inputs, targets).item() * int((targets != IGNORED).sum())
        assert total == pytest.approx(-log_likelihood, rel=1e-5)


def test_generated_answer_ends_in_the_end_of_text(tokenizer):
    rows = [{"question": "1 + 1?", "answer": "2 #### 2"}, {"question": "2 + 1?", "answer": "3 #### 3"}]
    made = examples(tiny_model("llama"), tokenizer, "gsm8k", rows, block_size=16)
    for row, (tokens, targets) in zip(rows, made, strict=True):
        assert tokenizer.decode(tokens) == f"Question: {row['question']}\nAnswer: {row['answer']}"
        answer = [target for target in targets if target != IGNORED]
        assert tokenizer.decode(answer) == f" {row['answer']}<eos>"


def test_every_token_of_a_text_is_a_target_once(tokenizer):
    pages = [{"page": "one page of some length"}, {"page": "another"}]
    made = examples(tiny_model("llama"), tokenizer, "wikitext", pages, block_size=8)
    joined = [token for row in pages for token in [*tokenizer(row["page"])["input_ids"], tokenizer.eos_token_id]]
    assert [token for tokens, _ in made for token in tokens] == joined[:-1]
    assert [token for _, targets in made for token in targets] == joined[1:]
    assert all(len(tokens) == 8 for tokens, _ in made[:-1]) and 0 < len(made[-1][0]) <= 8


def test_text_needs_an_end(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    said = refusal(lambda: examples(tiny_model("llama"), without, "wikitext", [{"page": "a"}], block_size=8))
    assert "end-of-text token" in said


def test_no_questions_are_refused(tokenizer):
    assert "task piqa" in refusal(lambda: examples(tiny_model("llama"), tokenizer, "piqa", [], block_size=16))


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


# --- the loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(9, 4), (100, 3), (5, 8), (1, 1)])
def test_an_epoch_has_every_question_once(count, size):
    lengths = [i * 37 % 50 for i in range(count)]
    first, again, other = (epoch_batches(lengths, size, generator(0, n)) for n in ("a", "a", "b"))
    assert sorted(i for batch in first for i in batch) == list(range(count))
    assert len(first) == math.ceil(count / size) and max(map(len, first)) <= size
    assert first == again and (first != other or len(first) == 1)


def test_batches_hold_questions_of_similar_length():
    lengths = [i * 37 % 101 for i in range(160)]
    batches = epoch_batches(lengths, 10, generator(0))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) < 20
    assert sorted(batches, key=lambda batch: lengths[batch[0]]) != batches  # and come in any order


def run(settings, data, seed=0, model=None, lr=1e-3):
    """Tune all of a tiny model; the history and the model."""
    model = model or tiny_model("llama")
    return tune(model, dict(model.named_parameters()), data, settings, lr=lr, seed=seed, label="test"), model


def test_every_epoch_sees_every_question_once(settings, data, monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "collate", lambda batch: seen.extend(batch) or collate(batch))
    history, _ = run(settings, data)
    assert len(history) == 9 and len(seen) == 27  # three epochs of three batches
    epochs = [seen[start : start + 9] for start in (0, 9, 18)]
    assert all(sorted(epoch) == sorted(data) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("limit", "steps"), [(1, 1), (4, 4), (100, 9), (0, 9)])
def test_step_limit_stops_training(settings, data, limit, steps):
    model, forwards = tiny_model("llama"), []
    model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    history, _ = run(settings.model_copy(update={"max_steps": limit}), data, model=model)
    assert [row["step"] for row in history] == list(range(steps)) and len(forwards) == steps


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_only_the_given_parameters_change(name, settings, data):
    model = emulator_of(name)
    adapter = layer_parameters(model, PLAN, "adapter")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tune(model, adapter, data, settings, lr=1e-3, seed=0, label="test")
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(before[key], tensor)}
    assert changed <= adapter.keys()
    assert changed >= {key for key, p in adapter.items() if p.ndim == 2}
    assert not any(p.requires_grad for p in model.parameters())


def test_loss_goes_down(settings, data):
    history, _ = run(settings.model_copy(update={"epochs": 20}), data, lr=1e-2)
    losses = [row["loss"] for row in history]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_loss_that_is_no_number_ends_the_run(settings, data):
    model = tiny_model("llama")
    model.model.norm.weight.fill_(math.nan)
    assert "loss is nan at step 0" in refusal(lambda: run(settings, data, model=model))


def test_seed_decides_every_byte(settings, data):
    (first, one), (again, two), (other, three) = (run(settings, data, seed=seed) for seed in (0, 0, 1))
    assert first == again and weights_hash(one) == weights_hash(two)
    assert first != other and weights_hash(one) != weights_hash(three)


# --- the learning rate -----------------------------------------------------------------------------------


def choose(data, settings, folder, rates, model=None, **changes):
    """The choice between some rates for all of a tiny model."""
    model = model or tiny_model("llama")
    return choose_rate(
        model,
        dict(model.named_parameters()),
        data,
        settings.model_copy(update={"lr": rates, **changes}),
        seed=0,
        label="test",
        checkpoint=Checkpoint(folder, math.inf),
    )


def test_single_rate_is_taken_as_it_is(data, settings, tmp_path):
    assert choose(data, settings, tmp_path, [0.5]) == {"lr": 0.5, "validation_loss": {}}


def test_best_rate_is_that_of_lowest_loss_on_held_out_questions(data, settings, tmp_path, monkeypatch):
    seen, scored = [], []
    tuned, loss = tuning.tune, tuning.mean_answer_loss
    monkeypatch.setattr(tuning, "tune", lambda *args, **options: seen.append(args[2]) or tuned(*args, **options))
    monkeypatch.setattr(tuning, "mean_answer_loss", lambda *args: scored.append(args[1]) or loss(*args))
    model = tiny_model("llama")
    before = weights_hash(model)
    choice = choose(data, settings, tmp_path, [1e-6, 1e-2, 1e-3], model, validation=0.3)
    assert weights_hash(model) == before  # for the run that counts
    assert len(seen) == len(scored) == 3 and all(len(part) == 3 for part in scored)
    for trained, held in zip(seen, scored, strict=True):
        assert sorted(trained + held) == sorted(data)
    losses = choice["validation_loss"]
    assert losses.keys() == {"1e-06", "0.01", "0.001"} and str(choice["lr"]) == min(losses, key=losses.__getitem__)
    for lr in (1e-6, 1e-2):  # by hand
        _, by_hand = run(settings, seen[0], lr=lr)
        assert losses[str(lr)] == pytest.approx(loss(by_hand, scored[0], 100), rel=1e-5)


def test_finished_rates_are_not_tried_again(data, settings, tmp_path, monkeypatch):
    first = choose(data, settings, tmp_path, [1e-3, 1e-4])
    monkeypatch.setattr(tuning, "tune", lambda *args, **options: pytest.fail("it was tuned again"))
    assert choose(data, settings, tmp_path, [1e-3, 1e-4]) == first


def test_rate_that_diverges_is_not_chosen(data, settings, tmp_path, monkeypatch):
    def tune_or_diverge(*args, lr, **options):
        if lr > 0.1:
            raise Diverged("the loss is nan")

    monkeypatch.setattr(tuning, "tune", tune_or_diverge)
    choice = choose(data, settings, tmp_path / "some", [0.5, 1e-3])
    assert choice["lr"] == 1e-3 and choice["validation_loss"]["0.5"] is None
    assert "not finite with any learning rate" in refusal(choose, data, settings, tmp_path / "all", [0.5, 0.6])


def test_one_question_cannot_be_parted(data, settings, tmp_path):
    assert "can't be parted" in refusal(choose, data[:1], settings, tmp_path, [1e-3, 1e-4])
