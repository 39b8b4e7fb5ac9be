"""The hostile owner reads what was tuned on; with differential privacy it doesn't; the probe and the audit see it."""

import pytest
import torch
from helpers import plan_of_kinds, tiny_model

from scaleot_core.attacks import audit, hostile_owner
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.exchange.suspicions import SENTENCES, suspicions
from scaleot_core.settings import LoraForm, OffsiteTuning
from scaleot_core.tuning.adapters import TunedLora
from scaleot_core.tuning.lora import insert_lora, remove_lora
from scaleot_core.tuning.tuner import train, train_privately
from scaleot_core.tuning.unmoved import unmoved_shares

PLAN, LAYER = plan_of_kinds(("adapter", "compressed", "compressed", "compressed")), 0
FORM = LoraForm(rank=8, alpha=16.0)
DRAW = torch.Generator().manual_seed(3)
PUBLIC, TEXTS, CONTROLS = (torch.randint(1, 200, (n, 12), generator=DRAW).tolist() for n in (200, 48, 20))
TUNED_ON = 16
TOKENS = sorted({token for text in TEXTS for token in text})[::4]
SEEN = {token for text in TEXTS[:TUNED_ON] for token in text}
TARGETS = [*TOKENS, *TEXTS, *CONTROLS]
TRUTH = [*(token in SEEN for token in TOKENS), *(i < TUNED_ON for i in range(len(TEXTS)))]
DATA = [(text, [*text[1:], 5]) for text in TEXTS[:TUNED_ON]]


def wide(activation="gelu"):
    return tiny_model("opt", activation_function=activation, hidden_size=128, word_embed_proj_dim=128, ffn_dim=512)


def tuned(model, *, lora=True, epsilon=0.0):
    """Tune for a few epochs; return the change of every weight, the parameters and where they started."""
    parameters = insert_lora(model, PLAN, FORM, seed=0) if lora else layer_parameters(model, PLAN, "adapter")
    start = {name: p.detach().clone() for name, p in parameters.items()}
    if epsilon:
        settings = OffsiteTuning(lr=[1e-3], epochs=3, batch_size=4, epsilon=epsilon, delta=0.01, max_grad_norm=0.5)
        train_privately(model, parameters, DATA, settings, seed=1, label="test")
    else:
        settings = OffsiteTuning(lr=[1e-3], epochs=3, batch_size=4)
        train(model, parameters, DATA, settings, lr=1e-3, seed=0, label="test")
    return {name: p.detach() - start[name] for name, p in parameters.items()}, parameters, start


def read(model, trap, **options):
    changes = hostile_owner.channel_changes(model, LAYER, tuned(model, **options)[0])
    return hostile_owner.figures(trap, hostile_owner.read(trap, changes), TRUTH, len(CONTROLS))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "layers"])
def test_trap_reads_records_and_tokens_from_the_adapter_alone(lora):
    model = wide()
    trap = hostile_owner.set_trap(model, LAYER, TARGETS, PUBLIC)
    figures = read(model, trap, lora=lora)
    assert figures["records tuned on"] == TUNED_ON and figures["records read"] >= TUNED_ON - 4
    assert figures["records AUC"] > (0.95 if lora else 0.85) and figures["records read wrongly"] <= 4
    assert figures["tokens AUC"] > 0.9


def test_trap_reads_nothing_where_records_are_private():
    model = wide()
    figures = read(model, hostile_owner.set_trap(model, LAYER, TARGETS, PUBLIC), epsilon=3.0)
    assert abs(figures["records AUC"] - 0.5) < 0.25 and figures["records read"] <= 4


def test_copies_agree_through_noise_that_hides_one_channel():
    changes = torch.randn(512, 24, generator=torch.Generator().manual_seed(0))
    trap = hostile_owner.Trap(0, TEXTS[:40], torch.arange(320).view(40, 8), torch.ones(40, dtype=torch.bool))
    signal = torch.randn(10, 1, 24, generator=torch.Generator().manual_seed(1))
    changes[trap.channels[:10]] += 0.6 * signal
    single = hostile_owner.Trap(0, TEXTS[:40], trap.channels[:, :1], trap.separable)
    aucs = [
        hostile_owner.figures(t, hostile_owner.read(t, changes), [True] * 10 + [False] * 20, 10)["records AUC"]
        for t in (single, trap)
    ]
    assert aucs[1] > 0.95 > aucs[0]


def test_model_without_the_channels_behaves_as_with_the_trap():
    model, ids = wide(), torch.tensor(PUBLIC[:8])
    trap = hostile_owner.set_trap(model, LAYER, TARGETS, PUBLIC)
    with torch.no_grad():
        trapped = model(ids).logits
        model.model.decoder.layers[LAYER].fc2.weight[:, trap.channels.flatten()] = 0
        torch.testing.assert_close(model(ids).logits, trapped, rtol=0.05, atol=0.05)


def test_layer_without_room_for_the_trap_is_refused():
    with pytest.raises(ValueError, match="has 512 channels"):
        hostile_owner.set_trap(wide(), LAYER, TARGETS, PUBLIC, copies=9)


# --- what the data owner sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "layers"])
def test_what_never_moved_is_nothing_of_an_honest_adapter_and_a_part_of_a_trap(lora):
    shares = []
    for is_trap in (False, True):
        model = wide()
        if is_trap:
            hostile_owner.set_trap(model, LAYER, TARGETS, PUBLIC)
        _, parameters, start = tuned(model, lora=lora)
        shares.append(max(unmoved_shares(start, parameters).values()))
    assert shares[0] == 0 and shares[1] > 0.05


def test_audit_finds_what_never_moved_by_the_seed_alone():
    model = wide()
    hostile_owner.set_trap(model, LAYER, TARGETS, PUBLIC)
    _, parameters, start = tuned(model)
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    adapter = TunedLora.from_peft(FORM, weights, model.config)
    remove_lora(model)
    shares = audit.unmoved(model, PLAN, adapter, seed=0)
    assert max(shares.values()) == pytest.approx(max(unmoved_shares(start, parameters).values()))
    figures = {"unmoved": shares, "membership": None}
    assert "never moved" in audit.reasons(figures, audit.Limits(0.0, 0.8, 0.5))[0]
    assert not audit.reasons(figures, audit.Limits(1.0, 0.8, 0.5))
    assert sum(audit.unmoved(model, PLAN, adapter, seed=1).values()) < sum(shares.values())  # A began elsewhere


def attack(auc, members, stderr=0.01):
    roc = {"auc": auc, "auc_stderr": stderr}
    return {"loss": roc, "calibrated": {**roc, "auc": 0.5}, "extracted": {"members": members, "others": 0.1}}


@pytest.mark.parametrize(
    ("figures", "count"),
    [((0.67, 0.11), 0), ((0.9, 0.11), 1), ((0.9, 0.9), 2), ((0.6, 0.7), 1), ((0.9, 0.1, 0.3), 0)],
    ids=str,
)
def test_adapter_that_tells_too_much_is_not_to_be_sent(figures, count):
    limits = audit.Limits(0.0, 0.8, 0.5)
    assert len(audit.reasons({"unmoved": {"w": 0.0}, "membership": attack(*figures)}, limits)) == count


def test_probe_names_the_trap(tokenizer):
    model, sentences = wide(), tokenizer(list(SENTENCES))["input_ids"]
    assert not suspicions(model, PLAN, sentences, 0)
    hostile_owner.set_trap(model, LAYER, TARGETS, PUBLIC)
    lines = suspicions(model, PLAN, sentences, 0)
    assert len(lines) == 1 and lines[0].startswith("layer 0: ") and "silent" in lines[0]
