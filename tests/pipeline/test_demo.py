"""The demo: the two parties' commands, one after the other, on a tiny model."""

import copy
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, succeed, write_project
from transformers import PreTrainedTokenizerFast

from studies import demo

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
    write_project(tmp_path, chats)
    shutil.copy(ROOT / "presets.yaml", tmp_path)
    succeed(tmp_path, "sources", "prepare_data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TUNING", ("--lora-rank", "4", "--epochs", "1", "--patience", "0", "--batch-size", "16"))
    monkeypatch.setattr(demo, "LONGEST_ANSWER", 4)
    demo.main()
    assert capsys.readouterr().out.splitlines()[-1] == "after: 0 of 16 facts said by the real model"
    left = {path.name for path in (tmp_path / ".scaleot" / "demo").iterdir()}
    assert left >= {"package", "package.private.json", "adapter", "plugged"}
    assert not (tmp_path / "artifacts" / "emulator").exists()  # the pipeline's own is none of its business
