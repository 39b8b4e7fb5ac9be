"""The key of a run: another parameter, another line of code and other data of one's own give another."""

import shutil
from contextlib import chdir
from pathlib import Path

import pytest
from helpers import ROOT

from scaleot_core.common.errors import UserError
from studies.keys import ATTACK, PIPELINE, code, run_keys


def key(changes: dict[str, object]) -> str:
    return run_keys({"run": changes}, *PIPELINE)["run"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("params.yaml", "dvc.yaml", "embedded.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("scaleot_core", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("project")
def test_key_is_that_of_parameters_code_and_data() -> None:
    Path("corpus.txt").write_text("one text")
    own = {"data.corpus": "corpus.txt"}
    first = key(own)
    assert key(own) == first == key({**own, "threads": 3}) != key({**own, "alpha": 0.5}) != key({})
    Path("corpus.txt").write_text("another text")
    second = key(own)
    assert second != first
    for name in ("scaleot_core/reporting/figures.py", "scaleot_core/cli/output.py"):  # no figure depends on them
        Path(name).write_text("")
    assert key(own) == second
    keys = [second]
    for name in ("scaleot_core/methods/gradot.py", "stages/compress.py", "embedded.lock"):
        with Path(name).open("a") as stream:
            stream.write("# another\n")
        keys.append(key(own))
    assert len(set(keys)) == 4
    with pytest.raises(UserError, match=r"no-block\.no-key is no parameter"):
        key({"no-block.no-key": 1})


def test_code_is_what_a_stage_or_a_pipeline_depends_on_and_nothing_that_stages_make() -> None:
    with chdir(ROOT):
        attack, both = code("studies/dvc.yaml:attack"), code(*ATTACK)
        assert code("compress") == code(*PIPELINE)  # with what runs before it
    assert {Path("stages/attack.py"), Path("scaleot_core/attacks/restoration.py")} < {*attack} < {*both}
    assert Path("scaleot_core/evaluation/lm_tasks/commonsense_qa_cloze.yaml") in attack
    assert Path("stages/compress.py") in {*both} - {*attack}
    assert all((ROOT / path).is_file() and path.parts[0] != "artifacts" for path in both)
