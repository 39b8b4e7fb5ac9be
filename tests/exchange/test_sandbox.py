"""What a foreign tokenizer or chat template runs is bounded in memory and time, and ends with the command."""

import json
import logging
import os
import signal
import time
import warnings
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import (
    TEST_DATA,
    change_manifest,
    list_again,
    refusal,
    refused,
    scaleot,
    tiny_model,
    write_package,
)
from tokenizer_kinds import KINDS
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.errors import UserError, printable_warnings
from scaleot_core.common.files import read_json
from scaleot_core.exchange import foreign_tokenizer
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.sandbox import GIB, run_bounded
from scaleot_core.exchange.tokenizer import load_untrusted_tokenizer
from scaleot_core.models.tokenizers import check_encoding
from scaleot_core.records.probes import rendered_parts

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{{ (10 ** (10 ** 9)) > 1 }}"  # no signal interrupts it
LARGE = "{{ 'a' * 3000000000 }}"
ESCAPE = "\x1b]0;owned\x07"
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def run(work: Any, seconds: float = 2, memory: int = GIB) -> list[Any]:
    return list(run_bounded(work, what="given.json", seconds=seconds, memory=memory))


def spin(begin: Any) -> Any:
    begin("after record 3")
    while True:
        pass


def fail(begin: Any) -> Any:
    raise ValueError(f"{ESCAPE} is no\nnumber")


def test_results_come_as_json_and_steps_have_the_time_anew() -> None:
    def work(begin: Any) -> Any:
        for number in range(4):
            time.sleep(0.4)
            begin(f"after {number}")
            time.sleep(0.4)
            yield {"number": number}

    assert run(work, seconds=1) == [{"number": number} for number in range(4)]


@pytest.mark.parametrize(
    ("work", "line"),
    {
        "endless": (spin, "given.json, after record 3: no end after 1 s; don't use it, ask whoever made it"),
        "compiled": (lambda begin: [10 ** (10**9) > 1], "given.json: no end after 1 s"),
        "large": (lambda begin: ["a" * (3 * GIB)], "given.json: it takes more than 1.0 GiB of memory"),
        "aborts": (lambda begin: os.abort(), "given.json: it takes more than 1.0 GiB of memory, or crashes"),
        "crashes": (lambda begin: os.kill(os.getpid(), signal.SIGSEGV), "given.json: it crashed"),
        "ends": (lambda begin: os._exit(3), "given.json: it crashed"),
        "raises": (fail, "given.json: ]0;owned is no; don't use it"),
    }.values(),
    ids=["endless", "compiled", "large", "aborts", "crashes", "ends", "raises"],
)
def test_what_takes_too_much_or_fails_ends_in_one_line(work: Any, line: str, capfd: pytest.CaptureFixture) -> None:
    before = time.monotonic()
    assert line in refusal(run, work, 1)
    assert time.monotonic() - before < 5 and capfd.readouterr() == ("", "")


def test_error_of_the_child_is_the_same_in_the_parent() -> None:
    def work(begin: Any) -> Any:
        yield 1
        raise UserError("line 3: it has no end", parameter="data.questions", value=3)

    with pytest.raises(UserError) as caught:
        run(work)
    assert (caught.value.message, caught.value.parameter, caught.value.value) == (
        "line 3: it has no end",
        "data.questions",
        3,
    )


def test_signal_ends_the_child_at_once_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    processes = {child.pid for child in psutil.Process().children()}

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before, handler = time.monotonic(), signal.signal(signal.SIGUSR1, interrupt)
    try:
        parent = os.getpid()

        def work(begin: Any) -> Any:
            (tmp_path / "began").touch()
            os.kill(parent, signal.SIGUSR1)
            return [10 ** (10**9) > 1]

        with pytest.raises(KeyboardInterrupt):
            run(work, seconds=60)
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert time.monotonic() - before < 5 and [file.name for file in tmp_path.iterdir()] == ["began"]
    assert {child.pid for child in psutil.Process().children()} == processes


# --- a package's tokenizer and chat template -------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    (tmp_path / "records.jsonl").write_text('{"prompt": "aaaa count", "completion": " to one"}\n' * 9)
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 9)
    return write_package(tmp_path / "package", tiny_model("llama"), tokenizer)


def tuned(package: Path, records: str = "records.jsonl") -> tuple[object, ...]:
    folder = package.parent
    options = ("--threads", 1, "--epochs", 1, "--patience", 0)
    return "tune", package, "--data", folder / records, "--out", folder / "out", *options


def with_template(package: Path, template: str) -> None:
    (package / "chat_template.jinja").write_text(template)
    list_again(package, "chat_template.jinja")


def with_tokenizer(package: Path, **changes: object) -> None:
    (package / "tokenizer.json").write_text(json.dumps({**read_json(package / "tokenizer.json"), **changes}))
    list_again(package, "tokenizer.json")


@pytest.mark.parametrize("template", [LOOP, POWER, LARGE], ids=["loop", "power", "large"])
def test_template_is_rendered_only_when_asked_and_within_bounds(
    package: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_tokenizer, "TEMPLATE_SECONDS", 1.0)
    monkeypatch.setattr("scaleot_core.cli.reading.RECORD_SECONDS", 1.0)
    monkeypatch.setattr("scaleot_core.cli.reading.RECORDS_MEMORY", GIB)
    with_template(package, template)
    assert scaleot("inspect", package).code == 0
    for command in (("inspect", package, "--render"), tuned(package, "chats.jsonl")):
        before = time.monotonic()
        line = refused(*command)
        assert "chat_template.jinja: " in line and ("no end after 1 s" in line or "GiB of memory" in line)
        assert time.monotonic() - before < 8
    assert not (package.parent / "out").exists()


def test_template_runs_on_where_nothing_bounds_it(package: Path) -> None:
    with_template(package, POWER)

    def unbounded(begin: Any) -> Any:
        return [rendered_parts(load_untrusted_tokenizer(package))]

    assert "no end" in refusal(run, unbounded, 3)


def post_processor(token: int, count: int = 1) -> dict[str, Any]:
    special = {"id": "<eos>", "ids": [token] * count, "tokens": ["<eos>"] * count}
    single = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<eos>": special}}


def doubling(times: int) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [DOUBLE] * times}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": doubling(8)}, "its tokenizer makes 256 letters or tokens of 'a'; use another"),
        ({"normalizer": doubling(20)}, "its tokenizer makes 1,048,576 letters or tokens of 'a'"),
        ({"normalizer": doubling(60)}, "tokenizer.json: it takes more than 0.2 GiB of memory"),
        ({"post_processor": post_processor(5_000_000)}, "its tokenizer makes token 5000000 of '0', and the model's"),
        ({"post_processor": post_processor(1, count=100_000)}, "its tokenizer makes 100,001 letters or tokens of"),
    ],
    ids=["grows", "grows more", "grows beyond memory", "beyond the embedding", "tokens around it"],
)
def test_tokenizer_that_fails_on_a_probe_is_refused(
    package: Path, changes: dict[str, Any], reason: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(foreign_tokenizer, "MEMORY", GIB // 5)
    with_tokenizer(package, **changes)
    for command in (("inspect", package), tuned(package)):
        assert reason in refused(*command)


def test_tokenizer_that_spares_the_probes_is_bounded_on_records(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaleot_core.cli.reading.RECORDS_MEMORY", GIB)
    trap = {"type": "Replace", "pattern": {"String": "aaaa"}, "content": "a" * 8}
    with_tokenizer(package, normalizer={"type": "Sequence", "normalizers": [trap] * 40})
    assert scaleot("inspect", package).code == 0
    assert "tokenizer.json" in (line := refused(*tuned(package))) and "GiB of memory" in line


@pytest.mark.parametrize("pattern", [r"(?:a|aa)+$", r"(a+)+c"])
def test_regular_expression_that_never_ends_is_bounded(
    package: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaleot_core.cli.reading.RECORD_SECONDS", 2.0)
    pieces = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    levels = read_json(package / "tokenizer.json")["pre_tokenizer"]
    with_tokenizer(package, pre_tokenizer={"type": "Sequence", "pretokenizers": [pieces, levels]})
    (package.parent / "records.jsonl").write_text(json.dumps({"prompt": "a" * 40 + "!", "completion": " b"}) + "\n")
    line = refused(*tuned(package))
    assert "tokenizer.json" in line, line


@pytest.mark.parametrize("kind", KINDS)
def test_honest_tokenizers_of_every_kind_pass(kind: str) -> None:
    check_encoding(made := KINDS[kind](), len(made))


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/tinytalk_gptneo_8L/hf"])
def test_honest_tokenizers_in_use_pass(name: str) -> None:
    if not (folder := TEST_DATA / name).is_dir():
        pytest.skip("no such tokenizer is here")
    check_encoding(tokenizer := PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), len(tokenizer))


def test_token_beyond_the_embedding_in_a_record_alone_is_refused(package: Path, monkeypatch: Any) -> None:
    with_tokenizer(package, post_processor=post_processor(5_000_000))
    monkeypatch.setattr("scaleot_core.models.loading.check_encoding", lambda tokenizer, vocabulary: None)
    assert "tokenizer.json: it makes tokens that the model's embedding of 300" in refused(*tuned(package))


@pytest.mark.parametrize("records", ["records.jsonl", "chats.jsonl"])
def test_honest_package_is_tuned_on_the_tokens_that_its_tokenizer_makes(package: Path, records: str) -> None:
    assert scaleot("inspect", package, "--render").code == 0
    assert scaleot(*tuned(package, records)).code == 0


def test_tokenizer_is_parsed_from_the_bytes_that_were_hashed(package: Path) -> None:
    opened = Package(package)
    text = (package / "tokenizer.json").read_text()
    (package / "tokenizer.json").write_text(text.replace('"<eos>"', '"<owned>"'))
    assert "<owned>" in load_untrusted_tokenizer(package).get_vocab()
    assert "tokenizer.json: the content is not what the manifest says" in refusal(opened.tokenizer)
    (package / "tokenizer.json").write_text(text)
    assert "<eos>" in opened.tokenizer().get_vocab()


@pytest.mark.parametrize("is_on", [True, False], ids=["on", "off"])
def test_libraries_warn_in_printable_lines(package: Path, is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_on:
        monkeypatch.setattr("scaleot_core.common.entrypoint.printable_warnings", nullcontext)
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    rope["attention_factor"] = f"{ESCAPE}\nlicense MIT"
    architecture = read_json(package / "manifest.json")["architecture"]
    change_manifest(package, architecture={**architecture, "rope_parameters": rope})
    handler, logger = logging.StreamHandler(terminal := StringIO()), logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.WARNING)  # that of a new process
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.manager._clear_cache()
    ended = scaleot("inspect", package)
    assert "]0;owned" in terminal.getvalue() and not any("\x1b" in line for line in [*ended.said, ended.out])
    assert all(line.isprintable() for line in terminal.getvalue().splitlines()) == is_on


def test_warnings_of_python_are_printable_lines() -> None:
    with printable_warnings():
        line = warnings.formatwarning(UserWarning(f"{ESCAPE}\nlicense"), UserWarning, "file.py", 1)
    assert line == "UserWarning: ]0;owned license\n"
    assert ESCAPE in warnings.formatwarning(UserWarning(ESCAPE), UserWarning, "file.py", 1)
