import pytest
import torch
from helpers import can_be_silent, silence, tiny_model

from scaleot_core.common.errors import UserError
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression.layer_importance import (
    block_influence,
    estimate,
    new_harmonizers,
    prior_scores,
    read_scores,
    restore,
)


@can_be_silent
def test_every_estimator_ranks_an_identity_layer_lowest(model, blocks):
    silence(model, 2)
    harmonizers = new_harmonizers(model.config, 8, seed=0)
    assert block_influence(model, blocks)[2] == pytest.approx(0, abs=1e-6)
    assert estimate("sensitivity", model, harmonizers, blocks)[2] == pytest.approx(0, abs=1e-6)


def test_prior_scores_keep_the_order_and_are_finite():
    scores = prior_scores([0.02, -0.01, 3.0, 0.5])
    assert sorted(range(4), key=lambda i: scores[i]) == [1, 0, 3, 2] or scores[1] == scores[0]
    assert torch.tensor(scores).mean().abs() < 1e-6 and torch.tensor(scores).std().item() == pytest.approx(2)
    assert prior_scores([0.0] * 5) == [0.0] * 5


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "null", '"1"', "true"])
def test_score_that_is_no_number_is_named(tmp_path, bad):
    (tmp_path / "scores.json").write_text(f'{{"scores": [1, 2.5, {bad}, 3]}}')
    with pytest.raises(UserError, match=r"scores\.json: layer 2 has score"):
        read_scores(tmp_path / "scores.json", 4)


def test_harmonizers_of_another_model_are_refused_by_name(tmp_path):
    model = tiny_model("llama")
    write_tensors(tmp_path / "h.safetensors", new_harmonizers(model.config, 4, seed=0).state_dict())
    with pytest.raises(UserError, match=r"0\.down\.bias.*\(4,\).*\(8,\)"):
        restore(new_harmonizers(model.config, 8, seed=0), tmp_path / "h.safetensors")
