"""A stage as dvc.yaml declares it: its cost, its checkpoint's key, and the item that its command line names."""

import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from scaleot_core import pipeline
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json
from scaleot_core.pipeline import item_from_arguments, read_entry, run_stage

ITEM = {"task": "piqa", "adapters": "lora"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pipeline's files and nothing run."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("artifacts/emulator", "artifacts/tasks/piqa", "scaleot_core"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "artifacts/emulator/base.safetensors").write_bytes(b"weights")
    (tmp_path / "artifacts/tasks/piqa/train.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def key(stage: str = "offsite_tune") -> Path:
    """Where a stage's checkpoint would be."""
    item = ITEM if stage == "offsite_tune" else None
    with run_stage(stage, item) as found:
        return found.checkpoint.folder


def test_cost_is_written_once_the_work_ended_well(project: Path) -> None:
    cost = project / "costs/offsite_tune-piqa-lora.json"
    with pytest.raises(ZeroDivisionError), run_stage("offsite_tune", ITEM):
        raise ZeroDivisionError
    assert not cost.exists()
    with run_stage("offsite_tune", ITEM) as stage:
        stage.meter.tokens = 7
        assert not cost.exists() and stage.label == "offsite_tune@piqa-lora"
    found = read_json(cost)
    assert found.keys() >= {"tokens", "seconds", "peak_memory_mib"} and found["tokens"] == 7
    assert found["seconds"] >= 0 and 50 < found["peak_memory_mib"] < 100_000


def test_checkpoint_is_gone_once_the_work_ended_well_and_stays_where_it_failed(project: Path) -> None:
    for error in (KeyboardInterrupt, None):
        with pytest.raises(BaseException) if error else pytest.MonkeyPatch.context(), run_stage("compress") as stage:
            stage.checkpoint.folder.mkdir(parents=True, exist_ok=True)
            if error:
                raise error
        assert stage.checkpoint.folder.exists() == bool(error)


def test_checkpoint_is_keyed_by_what_dvc_watches(project: Path) -> None:
    first = key()
    assert key() == first
    edit(project / "params.yaml", "threads: 0 ", "threads: 1 ")  # where it runs, not what it computes
    edit(project / "params.yaml", "  whiten: true", "  whiten: false")  # another stage's
    (project / "artifacts/tasks/piqa/eval.jsonl").write_text("not its own")
    assert key() == first
    found = [first]
    for file, old, new in (
        ("params.yaml", "alpha: 32.0", "alpha: 16.0"),
        ("params.yaml", "seed: 0", "seed: 1"),
        ("artifacts/tasks/piqa/train.jsonl", "{}", "{ }"),
        ("artifacts/emulator/base.safetensors", "weights", "others"),
    ):
        edit(project / file, old, new)
        found.append(key())
    (project / "scaleot_core/tuning").mkdir()
    (project / "scaleot_core/tuning/tuner.py").write_text("x = 1")
    found.append(key())
    (project / "scaleot_core/tuning/__pycache__").mkdir()
    (project / "scaleot_core/tuning/__pycache__/tuner.pyc").write_text("compiled")
    found.append(key())
    assert len(set(found)) == 6 and found[-1] == found[-2]


def test_entry_of_an_item_has_its_own_paths(project: Path) -> None:
    entry = read_entry("offsite_tune", ITEM)
    assert Path("artifacts/tasks/piqa/train.jsonl") in entry.deps and Path("artifacts/adapters/piqa/lora") in entry.outs
    assert entry.cost == Path("costs/offsite_tune-piqa-lora.json")
    assert read_entry("evaluate").cost == Path("costs/evaluate.json")


@pytest.mark.parametrize("arguments", [[], ["piqa"], ["nosuch", "lora"], ["piqa", "piqa"]])
def test_item_that_params_do_not_have_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stages/offsite_tune.py", *arguments])
    with pytest.raises(UserError, match=r"name one of the tasks .*piqa\|commonsense_qa_cloze"):
        item_from_arguments("offsite_tune")


def test_item_is_what_the_command_line_names(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stages/offsite_tune.py", "piqa", "lora"])
    assert item_from_arguments("offsite_tune") == ITEM


def test_without_dvc_yaml_the_folder_is_the_wrong_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run from the project's folder"):
        pipeline.read_entry("compress", file=tmp_path / "dvc.yaml")
