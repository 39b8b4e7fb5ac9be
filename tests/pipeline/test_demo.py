"""The demo: the two parties' commands, one after the other, on a tiny model."""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, succeed, write_project
from transformers import PreTrainedTokenizerFast

from studies import demo
from studies.experiments import Run

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_demo_packs_tunes_plugs_in_and_asks(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = TEMPLATE
    experiment = tmp_path / "experiment"
    experiment.mkdir()

    class MadeHere(Run):
        def write(self, path: str, folder: Path) -> None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            source = experiment / path
            shutil.copytree(source, folder / path) if source.is_dir() else shutil.copy(source, folder / path)

    def run_all(runs: Mapping[str, Any], label: str, targets: list[str]) -> dict[str, Run]:
        ((name, changes),) = runs.items()
        assert targets == ["compress"]
        write_project(experiment, chats, **changes)
        succeed(experiment, "sources", "prepare_data", "layer_importance", "train_harmonizers", "compress")
        shutil.copytree(experiment / "artifacts/model", "artifacts/model", dirs_exist_ok=True)
        return {name: MadeHere("commit")}

    for name in ("presets.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "artifacts/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_all", run_all)
    monkeypatch.setattr(demo, "TUNING", ("--lora-rank", "4", "--epochs", "1", "--patience", "0", "--batch-size", "16"))
    monkeypatch.setattr(demo, "LONGEST_ANSWER", 4)
    demo.main()
    assert capsys.readouterr().out.splitlines()[-1] == "after: 0 of 16 facts said by the real model"
    left = {path.name for path in (tmp_path / ".scaleot" / "demo").iterdir()}
    assert left >= {"package", "package.private.json", "adapter", "plugged"}
    assert {path.name for path in (tmp_path / "artifacts").iterdir()} == {"model"}  # the pipeline's own is untouched
