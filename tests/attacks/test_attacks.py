"""Attacks: what they are given, that they win where there is something to win, and that they say so rightly."""

import math
from functools import partial

import pytest
import torch
from helpers import CPU, IDS, PLAN, dies_after, each_family, emulator_of, piqa_rows, tiny_model, write_package
from sklearn.metrics import roc_auc_score

from scaleot_core.attacks import exposure, membership, restoration
from scaleot_core.attacks.hidden import cut_parameters
from scaleot_core.attacks.targets import targets
from scaleot_core.common.files import write_json
from scaleot_core.common.random import generator
from scaleot_core.common.runtime import Runtime
from scaleot_core.compression.emulator import assemble, layer_parameters
from scaleot_core.compression.low_rank import LowRankLinear
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange.package import Package
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.models.forward import mean_loss
from scaleot_core.params import changed
from scaleot_core.settings import LoraForm
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.tuning.adapters import TunedLayers, TunedLora, plugged_in
from scaleot_core.tuning.examples import collate, from_task
from scaleot_core.tuning.lora import insert_lora
from scaleot_core.tuning.tuner import answer_loss, train


@pytest.fixture
def budget(params):
    return params.attack.model_copy(update={"steps": 40, "batch_blocks": 4, "lr": 3e-3, "eval_points": 2})


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- recovery --------------------------------------------------------------------------------------------


@each_family
def test_widened_emulator_starts_as_the_emulator_and_has_whole_layers(name):
    plain, wide = emulator_of(name), emulator_of(name)
    restoration.widen(wide, PLAN)
    if name != "opt-350m":  # its norms come behind
        torch.testing.assert_close(logits(wide), logits(plain), rtol=1e-4, atol=1e-5)
    whole = sum(p.numel() for p in decoder_layers(tiny_model(name))[0].parameters())
    assert sum(p.numel() for p in decoder_layers(wide)[0].parameters()) > whole
    assert not [m for m in wide.modules() if isinstance(m, LowRankLinear)]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(wide.generate(IDS, **options, use_cache=use) for use in (True, False)))


def test_emulator_that_lacks_layers_can_be_widened_too():
    plan = Plan(("harmonizer", "adapter", "removed", "compressed"), 0.8, PLAN.harmonizer)
    plain, wide = emulator_of("llama", plan), emulator_of("llama", plan)
    restoration.widen(wide, plan)
    torch.testing.assert_close(logits(wide), logits(plain), rtol=1e-4, atol=1e-5)


@each_family
def test_forgetting_leaves_adapters_embeddings_and_head(name):
    known, forgotten = emulator_of(name), emulator_of(name)
    restoration.forget(forgotten, PLAN, seed=0)
    adapters, path = layer_parameters(known, PLAN, "adapter"), family(known.config).layers
    for key, parameter in known.named_parameters():
        same = torch.equal(parameter, forgotten.get_parameter(key))
        assert same == (key in adapters or not key.startswith(path) or (parameter.ndim == 1 and same)), key


def attacked(model, blocks, budget, tmp_path, seed=0, name="a", seconds=1e9):
    checkpoint = Checkpoint(tmp_path / name, seconds)
    return restoration.restore(model, blocks, blocks, budget, seed=seed, label="attack", checkpoint=checkpoint)


def test_attack_wins_back_what_the_corpus_teaches(blocks, budget, tmp_path):
    curve = attacked(emulator_of("llama"), blocks, budget, tmp_path)
    assert [point["tokens"] for point in curve] == [0, 20 * 4 * 16, 40 * 4 * 16]
    assert curve[0]["loss"] == pytest.approx(mean_loss(emulator_of("llama"), blocks))
    assert curve[2]["loss"] < curve[1]["loss"] < curve[0]["loss"]


def test_attack_trains_every_weight(blocks, budget, tmp_path):
    model, before = emulator_of("llama"), dict(emulator_of("llama").named_parameters())
    attacked(model, blocks, budget, tmp_path)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_attacker_of_what_was_cut_leaves_the_rest_as_it_was(blocks, budget, tmp_path):
    model, before = emulator_of("llama"), dict(emulator_of("llama").named_parameters())
    trained = cut_parameters(tiny_model("llama"), model, PLAN)
    checkpoint = Checkpoint(tmp_path / "a", 1e9)
    options = {"seed": 0, "label": "attack", "checkpoint": checkpoint, "parameters": trained}
    curve = restoration.restore(model, blocks, blocks, budget, **options)
    assert curve[-1]["loss"] < curve[0]["loss"]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained.keys() and 0 < len(moved) < len(before)


def test_imitation_is_cross_entropy_to_what_the_served_model_says(blocks):
    model, served = emulator_of("llama").requires_grad_(True), tiny_model("llama")
    told, said = (m(input_ids=blocks[:2].long()).logits[:, :-1].softmax(-1) for m in (served, model))
    expected = -(told * said.log()).sum(-1).mean()
    loss = restoration.imitation_loss(model, served, blocks[:2])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    own = tiny_model("llama").requires_grad_(True)
    least = restoration.imitation_loss(own, served, blocks[:2])  # the entropy, and no way down from it
    least.backward()
    assert least < loss and all(p.grad is None or p.grad.abs().max() < 1e-6 for p in own.parameters())
    draw = torch.distributions.Categorical(told).sample((2000,))  # sampled labels have it for their mean
    sampled = torch.stack([-said.gather(-1, each[..., None]).log().mean() for each in draw]).mean()
    assert sampled.item() == pytest.approx(loss.item(), rel=1e-2)


@pytest.mark.slow
def test_attacker_by_queries_comes_nearer_to_the_served_model(blocks, budget, tmp_path):
    model, served = emulator_of("llama"), tiny_model("llama")
    before = restoration.imitation_loss(model, served, blocks).item()
    options = {"seed": 0, "label": "attack", "checkpoint": Checkpoint(tmp_path / "a", 1e9)}
    restoration.restore(
        model, blocks, blocks, budget, **options, loss=partial(restoration.imitation_loss, model, served)
    )
    assert restoration.imitation_loss(model, served, blocks).item() < before


def test_package_with_nothing_for_what_was_cut_has_no_such_attacker(tokenizer, params, tmp_path, capfd):
    removed = Plan(("removed", "adapter", "compressed", "compressed"), 0.0, PLAN.harmonizer)
    tiny_model("llama").save_pretrained(tmp_path / "model", save_original_format=False)
    for name, plan in (("cut", PLAN), ("removed", removed)):
        package = Package(write_package(tmp_path / name, tiny_model("llama"), tokenizer, plan))
        none = Checkpoint(tmp_path / "none", 1e9)
        blocks = torch.zeros(1, 4)
        owner = ModelOwner(
            tmp_path / "model", Runtime(CPU, torch.float32), blocks, params, tmp_path, tmp_path / "scratch", none
        )
        found = targets(package, owner, lambda: tiny_model("llama"))
        assert ("cut_only" in found) == (plan is PLAN)
        assert next(iter(found)) == "package" and {"queries", "without_weights"} < found.keys()
    assert "nothing in the place of what was cut" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 15, 20, 30])
def test_interrupted_attack_goes_on_to_the_same_figures(blocks, budget, tmp_path, killed_at):
    whole = attacked(emulator_of("llama"), blocks, budget, tmp_path, name="whole")
    with dies_after(restoration, "next_token_loss", killed_at), pytest.raises(KeyboardInterrupt):
        attacked(emulator_of("llama"), blocks, budget, tmp_path, name="again", seconds=0.0)
    model, done = emulator_of("llama"), emulator_of("llama")
    assert attacked(model, blocks, budget, tmp_path, name="again") == whole
    assert attacked(done, blocks, budget, tmp_path, name="again") == whole  # and what is over is there again
    assert all(torch.equal(p, done.get_parameter(name)) for name, p in model.named_parameters())


def test_shares_of_the_way_back_are_in_log_perplexity():
    found = {
        "package": [{"tokens": 0, "loss": 4.0}, {"tokens": 9, "loss": 3.5}],
        "other": [{"tokens": 0, "loss": 5.0}, {"tokens": 9, "loss": 3.0}],
    }
    rows = restoration.curves(found, 3.0)
    assert [(row["target"], row["tokens"], row["recovered"]) for row in rows] == [
        ("package", 0, 0.0),
        ("package", 9, 0.5),
        ("other", 0, -1.0),
        ("other", 9, 1.0),
    ]
    assert rows[1]["perplexity"] == pytest.approx(math.exp(3.5))
    assert [row["recovered"] for row in restoration.curves(found, 4.0)] == [None] * 4  # nothing was cut


# --- weights given away ----------------------------------------------------------------------------------


@each_family
def test_exposure_tells_every_tensor_of_the_model_once(name):
    model = tiny_model(name)
    rows = exposure.exposure(model, emulator_of(name), PLAN)
    total = sum(t.numel() * 4 for key, t in model.state_dict().items() if key not in model.all_tied_weights_keys)
    assert sum(row["bytes"] for row in rows) == total and len({row["tensor"] for row in rows}) == len(rows)
    path = family(model.config).layers
    of = {i: [row for row in rows if row["tensor"].startswith(f"{path}.{i}.")] for i in range(4)}
    assert {row["given"] for row in of[0]} == {"none"}  # the harmonizer's layer
    assert {row["given"] for row in of[1]} == {"exact"}  # the adapter layer
    cut = [row for row in of[2] if row["given"] == "rank"]
    assert cut and all(0 < row["error"] < 1 and row["overlap"] == pytest.approx(1, abs=1e-3) for row in cut)
    shares = exposure.shares(rows)
    assert sum(shares.values()) == pytest.approx(1) and all(shares.values())


def test_dense_product_of_low_rank_is_at_that_rank(tmp_path):
    plan = Plan(PLAN.kinds, 0.1, PLAN.harmonizer)  # two factors would be larger
    rows = exposure.exposure(tiny_model("llama"), emulator_of("llama", plan), plan)
    cut = [row for row in rows if row["given"] == "rank"]
    assert len(cut) == 8 and {row["rank"] for row in cut} == {29, 14} and all(0 < row["error"] < 0.5 for row in cut)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "given"),
    [({"method": "gradot", "max_bytes_ratio": 0.8}, "exact"), ({"channel_pruning.ratio": 0.25, "beta": 0.0}, "rank")],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_kept_channels_count_as_given(name, method, given, params, blocks, tmp_path):
    layers = 8
    real = tiny_model(name, num_hidden_layers=layers)
    real.save_pretrained(tmp_path, save_original_format=False)
    small = {
        "adapter_layers": 2,
        "alpha": 0.0,
        "gradot.calibration_blocks": 4,
        "rank_compression.calibration_blocks": 4,
    }
    write_json(tmp_path / "scores.json", {"scores": [float(i) for i in range(layers)]})
    values, none = changed(params, {**small, **method}), Checkpoint(tmp_path / "none", 1e9)
    owner = ModelOwner(tmp_path, Runtime(CPU, torch.float32), blocks, values, tmp_path, tmp_path / "scratch", none)
    made = METHODS[values.method](owner)
    plan, model = made.plan, assemble(owner.config, made.plan, made.tensors, device=CPU)
    rows = exposure.exposure(real, model, plan)
    out = family(real.config).feed_forward_out
    kept = [row for row in rows if row["tensor"].endswith(f"{out}.weight (kept channels)")]
    whole = real.get_submodule(f"{family(real.config).layers}.0.{out}").weight
    share = plan.cuts[plan.layers("compressed")[0]].channels / max(whole.shape)
    assert 0 < share < 1 and len(kept) == layers - 2
    assert all(row["bytes"] == round(whole.numel() * 4 * share) and row["given"] == given for row in kept)
    assert given == "exact" or all(row["rank"] == min(whole.shape) for row in kept)
    into = [row for row in rows if row["tensor"].endswith("weight (kept channels)") and row not in kept]
    assert into and {row["given"] for row in into} == {"exact"}
    assert sum(exposure.shares(rows).values()) == pytest.approx(1)


def test_everything_is_given_where_nothing_is_cut():
    plan = Plan(("adapter", *["compressed"] * 3), 0.0, PLAN.harmonizer)
    assert exposure.shares(exposure.exposure(tiny_model("llama"), emulator_of("llama", plan), plan))["exact"] == 1


def test_overlap_of_subspaces():
    basis, _ = torch.linalg.qr(torch.randn(8, 8))
    first, other = basis[:, :3] @ torch.randn(3, 9), basis[:, 3:6] @ torch.randn(3, 9)
    assert exposure.overlap(first, first @ torch.randn(9, 5), 3) == pytest.approx(1)
    assert exposure.overlap(first, other, 3) == pytest.approx(0, abs=1e-9)
    half = basis[:, [0, 1, 4, 5]] @ torch.randn(4, 9)
    assert exposure.overlap(basis[:, :4] @ torch.randn(4, 9), half, 4) == pytest.approx(0.5)


# --- membership ------------------------------------------------------------------------------------------


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


def told_of(model, tuned, *parts):
    """The attacks on an adapter, whose plug-in says other answers than the model."""
    base = [membership.answers(model, part, 4, "test") for part in parts]
    with plugged_in(model, PLAN, tuned):
        plugged = [membership.answers(model, part, 4, "test") for part in parts]
    assert plugged != base
    return membership.attack(base, plugged)


@pytest.mark.slow
def test_overfitted_adapter_gives_its_records_away_and_the_model_is_as_it_was(tokenizer, params):
    model, tuned = tiny_model("llama"), tiny_model("llama")
    data = from_task(model, tokenizer, "piqa", piqa_rows(24), block_size=16)
    members, others = data[::2], data[1::2]
    settings = params.offsite_tune.model_copy(update={"epochs": 40, "batch_size": 4})
    train(tuned, layer_parameters(tuned, PLAN, "adapter"), members, settings, lr=1e-2, seed=0, label="test")
    adapter = TunedLayers({name: p.detach() for name, p in layer_parameters(tuned, PLAN, "adapter").items()})
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = told_of(model, adapter, members, others)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found["calibrated"]["auc"] > 0.6
    assert "curve" not in membership.without_curve(found["loss"]) and found["extracted"].keys() == {"members", "others"}


@pytest.mark.slow
def test_lora_gives_its_records_away_too_and_the_model_is_as_it_was(tokenizer, params):
    model = tiny_model("llama")
    data = from_task(model, tokenizer, "piqa", piqa_rows(24), block_size=16)
    members, others = data[::2], data[1::2]
    tuned, form = tiny_model("llama"), LoraForm(rank=8, alpha=16.0, layers="all", modules="all")
    parameters = insert_lora(tuned, PLAN, form, seed=0)
    settings = params.offsite_tune.model_copy(update={"epochs": 40, "batch_size": 4})
    train(tuned, parameters, members, settings, lr=1e-2, seed=0, label="test")
    factors = {
        name.partition(".lora_A.")[0]: (p.detach(), parameters[name.replace("lora_A", "lora_B")].detach())
        for name, p in parameters.items()
        if ".lora_A." in name
    }
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = told_of(model, TunedLora(form, factors, False), members, others)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found["calibrated"]["auc"] > 0.6


def test_extraction_is_the_answer_said_word_for_word(tokenizer):
    model = tiny_model("llama")
    (example,) = from_task(model, tokenizer, "piqa", piqa_rows(1), block_size=16)
    tokens, targets = example
    said = model(torch.tensor([tokens])).logits[0].argmax(-1)
    spoken = (tokens, [int(said[k]) if target != -100 else -100 for k, target in enumerate(targets)])
    found = membership.answers(model, [spoken, example], 2, "test")
    assert [answer.said for answer in found] == [True, False]
    alone = [answer_loss(model, *collate([each])).item() for each in (spoken, example)]
    assert [answer.loss for answer in found] == pytest.approx(alone)
