"""What stages keep for later runs, beside DVC: served while the code is the same, and never after an edit."""

import pytest
from helpers import change, read_json, sha256, succeed, write_project

from scaleot_core.compression import svd


@pytest.fixture
def project(tmp_path, tokenizer):
    write_project(tmp_path, tokenizer, alpha=0.5, beta=0.5)
    succeed(tmp_path, "sources", "prepare_data", "layer_importance", "train_harmonizers", "compress")
    return tmp_path


def cut_weights(project):
    return sha256(project / "artifacts" / "emulator" / "compressed.safetensors")


def test_edit_of_the_code_of_factors_changes_them_and_nothing_less_does(project, monkeypatch):
    before = cut_weights(project)
    monkeypatch.setattr(svd, "DAMPING", 0.3)
    succeed(project, "compress")
    assert cut_weights(project) == before  # the kept factors serve as long as no file differs
    source = project / "scaleot_core" / "compression" / "svd.py"
    source.write_text(source.read_text().replace("DAMPING = 1e-4", "DAMPING = 0.3"))
    succeed(project, "compress")
    assert cut_weights(project) != before
    kept = [folder for folder in (project / ".scaleot" / "scratch").iterdir() if "decompositions" in folder.name]
    assert len(kept) == 1  # those of other code are gone


def test_a_method_that_needs_no_scores_makes_none(project):
    change(project, method="channels", channels={"ratio": 0.5}, adapter_layers=0, adapters=["lora"])
    succeed(project, "layer_importance", "train_harmonizers", "compress")
    for name in ("importance", "harmonizers"):
        folder = project / "artifacts" / name
        assert read_json(folder / "scores.json")["not_needed_by"] == "channels"
        assert not list(folder.glob("*.safetensors"))
    assert read_json(project / "artifacts" / "emulator.private.json")["scores"] == []
