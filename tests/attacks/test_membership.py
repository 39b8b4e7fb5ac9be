"""Membership attacks find what there is to find, and no more."""

import pytest
import torch
from helpers import PLAN, piqa_rows, tiny_model
from sklearn.metrics import roc_auc_score

from scaleot_core.attacks import membership
from scaleot_core.common.random import generator
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.settings import LoraForm
from scaleot_core.tuning.adapters import TunedLayers, TunedLora, plugged_in
from scaleot_core.tuning.examples import collate, from_task
from scaleot_core.tuning.lora import insert_lora
from scaleot_core.tuning.tuner import answer_loss, train


def test_roc_is_that_of_the_scores():
    draw = generator(0, "roc")
    members, others = (torch.randn(300, generator=draw) + shift for shift in (1.0, 0.0))
    found = membership.roc(members.tolist(), others.tolist())
    assert found.auc == pytest.approx(roc_auc_score([1] * 300 + [0] * 300, torch.cat([members, others])))
    fourth = others.sort(descending=True).values[3]  # 1 % of 300 others are three
    assert found.true_positives == pytest.approx(float((members > fourth).double().mean()))
    assert 0.01 < found.auc_stderr < 0.03


def test_scores_that_say_nothing_are_a_coin_and_perfect_ones_find_all():
    assert membership.roc([1.0, 1.0], [1.0, 1.0]).auc == 0.5
    perfect = membership.roc([2.0, 3.0], [0.0, 1.0])
    assert (perfect.auc, perfect.true_positives, perfect.auc_stderr) == (1.0, 1.0, 0.0)


def test_calibration_takes_out_how_hard_a_record_is():
    hard = [membership.Answer(loss, False) for loss in (1.0, 5.0, 9.0, 2.0, 6.0, 10.0)]
    plugged = [[membership.Answer(answer.loss - 1, True) for answer in hard[:3]], hard[3:]]
    found = membership.attack([hard[:3], hard[3:]], plugged)
    assert found["calibrated"]["auc"] == 1 and found["loss"]["auc"] < 1
    assert found["extracted"] == {"members": 1, "others": 0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_overfitted_adapters_give_their_records_away_and_the_model_is_as_it_was(kind, tokenizer, params):
    model, tuned = tiny_model("llama"), tiny_model("llama")
    data = from_task(model, tokenizer, "piqa", piqa_rows(24), block_size=16)
    form = LoraForm(rank=8, alpha=16.0, layers="all", modules="all")
    adapters = layer_parameters(tuned, PLAN, "adapter") if kind == "layers" else insert_lora(tuned, PLAN, form, seed=0)
    settings = params.offsite_tune.model_copy(update={"epochs": 40, "batch_size": 4})
    train(tuned, adapters, data[::2], settings, lr=1e-2, seed=0, label="test")
    weights = {name: parameter.detach() for name, parameter in adapters.items()}
    adapter = TunedLayers(weights) if kind == "layers" else TunedLora.from_peft(form, weights, model.config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def answers():
        return [membership.answers(model, part, 4, "test") for part in (data[::2], data[1::2])]

    base = answers()
    with plugged_in(model, PLAN, adapter):
        plugged = answers()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert plugged != base and membership.attack(base, plugged)["calibrated"]["auc"] > 0.6


def test_extraction_is_the_answer_said_word_for_word(tokenizer):
    model = tiny_model("llama")
    (example,) = from_task(model, tokenizer, "piqa", piqa_rows(1), block_size=16)
    tokens, targets = example
    said = model(torch.tensor([tokens])).logits[0].argmax(-1)
    spoken = (tokens, [int(said[k]) if target != -100 else -100 for k, target in enumerate(targets)])
    found = membership.answers(model, [spoken, example], 2, "test")
    assert [answer.extracted for answer in found] == [True, False]
    alone = [answer_loss(model, *collate([each])).item() for each in (spoken, example)]
    assert [answer.loss for answer in found] == pytest.approx(alone)
