import pytest
from helpers import change, run, write_project

from scaleot_core.data.fingerprints import local_fingerprint, source_fingerprint


def test_files_behind_links_count_and_a_circle_of_links_ends(tmp_path):
    elsewhere, questions = tmp_path / "elsewhere", tmp_path / "questions"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "train.jsonl").write_text("before")
    questions.mkdir()
    (questions / "piqa").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(questions)
    before = local_fingerprint(questions)
    assert "piqa/deep/train.jsonl" in before
    (elsewhere / "deep" / "train.jsonl").write_text("after")
    assert local_fingerprint(questions) != before


def test_hidden_files_do_not_count(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = local_fingerprint(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.txt").write_text("b")
    (tmp_path / ".c").write_text("c")
    assert local_fingerprint(tmp_path) == before == source_fingerprint(str(tmp_path), "", "model", tmp_path)["local"]


@pytest.mark.parametrize("path", ["/no/such/folder", "./nope", "../nope", "a b", "~/no-such", "no/such/deep/path"])
@pytest.mark.parametrize("key", ["model", "data.corpus", "data.questions"])
def test_a_path_that_is_not_there_ends_the_first_stage_in_one_line(tmp_path, tokenizer, key, path):
    write_project(tmp_path, tokenizer)
    block, _, name = key.rpartition(".")
    change(tmp_path, **({block: {name: path}} if block else {name: path}))
    ended = run(tmp_path, "sources")
    assert ended.code == 1
    assert ended.said[-1].startswith(f"error: params.yaml: {key} = {path!r}: no such file or folder")
    assert not (tmp_path / "artifacts").exists()
