"""The trial of what `plug` writes: an adapter that PEFT takes for another is noticed."""

import pytest
from helpers import CPU, LORA, refusal, tiny_model, write_adapter, write_package

from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.trial import trial_blocks, trial_lora, trial_loss
from scaleot_core.models.forward import mean_loss
from scaleot_core.models.opened import open_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_written_lora_is_the_plug_in_and_another_is_refused(name, tmp_path, tokenizer):
    tiny_model(name).save_pretrained(tmp_path / "real")
    tokenizer.save_pretrained(tmp_path / "real")
    package = Package(write_package(tmp_path / "package", tiny_model(name), tokenizer))
    tuned = adapter_folder.read(write_adapter(tmp_path / "lora", package.load(CPU), LORA, package), package)
    with open_model(str(tmp_path / "real"), scratch=tmp_path) as source:
        blocks = trial_blocks(None, source)
        loss = trial_loss(source, source.files, blocks)
        assert loss == pytest.approx(mean_loss(tiny_model(name), blocks), rel=1e-5)
        assert trial_lora(source, tmp_path / "lora", tuned, blocks) != loss
        for _, b in tuned.factors.values():
            b.mul_(1.1)
        message = refusal(trial_lora, source, tmp_path / "lora", tuned, blocks)
        assert "doesn't give the plug-in's logits" in message
