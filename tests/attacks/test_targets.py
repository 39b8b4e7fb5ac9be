"""What is attacked is the package by every attacker, and what it is compared with."""

import torch
from helpers import CPU, plan_of_kinds, tiny_model, write_package

from scaleot_core.attacks.targets import targets
from scaleot_core.common.runtime import Runtime
from scaleot_core.exchange.package import Package
from scaleot_core.methods import ModelOwner
from scaleot_core.training.checkpoint import Checkpoint


def test_package_with_nothing_for_what_was_cut_has_no_such_attacker(tokenizer, params, tmp_path, capfd):
    removed = plan_of_kinds(("removed", "adapter", "compressed", "compressed"))
    tiny_model("llama").save_pretrained(tmp_path / "model", save_original_format=False)
    for name, plan in (("cut", None), ("removed", removed)):
        package = Package(write_package(tmp_path / name, tiny_model("llama"), tokenizer, plan))
        none = Checkpoint(tmp_path / "none", 1e9)
        blocks = torch.zeros(1, 4)
        owner = ModelOwner(
            tmp_path / "model", Runtime(CPU, torch.float32), blocks, params, tmp_path, tmp_path / "scratch", none
        )
        found = targets(package, owner, lambda: tiny_model("llama"))
        assert ("cut_only" in found) == (plan is None)
        assert next(iter(found)) == "package" and {"queries", "without_weights"} < found.keys()
    assert "nothing in the place of what was cut" in capfd.readouterr().err
