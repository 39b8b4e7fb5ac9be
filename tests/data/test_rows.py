"""Rows of a file come as they stand in it, whatever kind of file it is, and an error says where."""

import bz2
import gzip
import json
import os
import socket
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from helpers import ROOT, refusal

from scaleot_core.data.rows import read_rows

ROWS = [{"prompt": "007", "completion": " 2024-01-01 10:00:00"}, {"prompt": "é 😀\u2028\x85", "completion": "NA"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1)


def rows(file):
    return [row for _, row in read_rows(file)]


def compressed(content, codec):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def csv(newline="\n"):
    return f'prompt,completion{newline}007," 2024-01-01 10:00:00"{newline}"é 😀\u2028\x85",NA{newline}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("no_suffix", LINES.encode()),
        ("bom.jsonl", LINES.encode("utf-8-sig")),
        ("two_boms.jsonl", b"".join(line.encode("utf-8-sig") + b"\n" for line in LINES.split("\n"))),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("mac.jsonl", LINES.replace("\n", "\r").encode()),
        ("blank.jsonl", f"\n{LINES}\n \n\n".encode()),
        ("utf16.jsonl", LINES.replace("\n", "\r\n").encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("members.jsonl.gz", b"".join(gzip.compress(line.encode() + b"\n") for line in LINES.split("\n"))),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.zst", compressed(LINES.encode(), "zstd")),
        ("a.jsonl.lz4", compressed(LINES.encode(), "lz4")),
        ("not_really.jsonl.gz", LINES.encode()),
        ("a.json", ARRAY.encode()),
        ("bom.json", b"\xef\xbb\xbf \r\n" + ARRAY.replace("\n", "\r\n").encode()),
        ("a.json.gz", gzip.compress(ARRAY.encode())),
        ("lines.json", LINES.encode()),
        ("array.jsonl", ARRAY.encode()),
        ("a.csv", csv().encode()),
        ("bom.csv", csv("\r\n").encode("utf-8-sig")),
        ("a.csv.gz", gzip.compress(csv().encode())),
    ],
)
def test_rows_come_as_they_stand(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert rows(tmp_path / name) == ROWS


def test_where_a_row_lies_is_told(tmp_path):
    for name, text, where in (
        ("a.jsonl", f"\n{LINES}", "line 3"),
        ("a.json", ARRAY, "record 2"),
        ("a.csv", 'prompt,completion\n"a\nb",c\nd,e\n', "line 4"),
    ):
        (tmp_path / name).write_text(text)
        assert [place for place, _ in read_rows(tmp_path / name)][-1] == f"{tmp_path / name}, {where}"


@pytest.fixture
def parquet(tmp_path):
    def write(name, *given):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(given)), tmp_path / name)
        return tmp_path / name

    return write


def test_parquet(parquet):
    assert rows(parquet("a.parquet", *ROWS)) == ROWS
    assert rows(parquet("odd name [1], *.bin", *ROWS)) == ROWS  # what it is, its content says


def test_what_a_row_of_parquet_lacks_is_not_there(parquet):
    given = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"properties": {"x": {"a": "b"}}}}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
    ]
    assert rows(parquet("a.parquet", *given)) == given


def test_columns_of_json_that_datasets_writes_come_back(tmp_path):
    from datasets import Dataset

    calls = [[{"function": {"arguments": arguments}}] for arguments in ({"a": 1}, {"b": "1"})]  # of no common type
    given = [{"messages": [{"role": "assistant", "tool_calls": call}]} for call in calls]
    Dataset.from_list(given).to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == given


@pytest.mark.slow
def test_parquet_needs_no_network_and_leaves_nothing_in_the_home(parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network is asked"))
    assert rows(parquet("a.parquet", *ROWS)) == ROWS
    script = "import sys; from pathlib import Path; from scaleot_core.data.rows import read_rows\n"
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(
        [sys.executable, "-c", script + "assert len(list(read_rows(Path(sys.argv[1])))) == 2", tmp_path / "a.parquet"],
        env={"PATH": "", "HOME": str(home), "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", 'cat > "$0"', tmp_path / "pipe"], stdin=subprocess.PIPE) as writer:
        writer.stdin.write(gzip.compress(LINES.encode()))
        writer.stdin.close()
        assert rows(tmp_path / "pipe") == ROWS


def test_a_large_file_is_read_as_it_is_used(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.writelines('{"text": "a"}\n' for _ in range(5000))
        stream.write("not JSON\n")
    found = read_rows(tmp_path / "a.jsonl.gz")
    assert next(found) == (f"{tmp_path / 'a.jsonl.gz'}, line 1", {"text": "a"})
    assert "line 5001: not valid JSON" in refusal(lambda: list(found))


DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": "b"}\n{"a": \n', "line 2: not valid JSON (its object doesn't end in } at column 5); give"),
        ("a.jsonl", b'{"a": "b"},\n', "line 1: not valid JSON (its object doesn't end in } at column 11); give"),
        ("a.jsonl", b'{"a": "b"}\n{"a": }\n', "line 2: not valid JSON (Expecting value at column 7)"),
        ("a.csv", b"prompt;completion\na;b\n", "line 1: fields are separated by commas, these by ';'; save it with"),
        ("a.jsonl", b'{"a": "b"}\n["a"]\n', "line 2: a JSON object is needed, this is a list"),
        ("a.jsonl", b'{"a": "b"}\n' + DEEP, "line 2: not valid JSON (maximum recursion depth"),
        ("a.jsonl", b'{"a": "b", "a": "c"}', "line 1: not valid JSON (the key 'a' is there twice)"),
        ("a.jsonl", rb'{"a": "cut \ud83d"}', r"line 1: \ud83d is half of a character"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "\xe9"}', "line 2: not UTF-8 text"),
        ("a.jsonl", b'{\n "a": "b"\n}', "its first object goes over several lines"),
        ("a.json", b'[{"a": "b"},\n{"a" "b"}]', "not valid JSON (Expecting ':' delimiter: line 2 column 6"),
        ("a.json", b'[{"a": "b"},', "not valid JSON"),
        ("a.json", b'["a"]', "record 1: a JSON object is needed, this is a str"),
        ("a.json", rb'[{"a": "\uDC00"}]', r"\udc00 is half of a character"),
        ("a.json", b"[" * 100_000, "not valid JSON (maximum recursion depth"),
        ("a.csv", b"prompt,completion\na\n", "line 2: it has more or fewer fields"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2: it has more or fewer fields"),
        ("a.csv", b"prompt,completion\n\xe9,b\n", "line 2: not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-12], "it can't be read to its end"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:30] + b"damage", "it can't be read to its end"),
        ("a.parquet", b"PAR1 and no more", "it can't be read to its end"),
        ("a.xlsx", b"PK\x03\x04\x14\x00\x00\x08", "it is no text; records are JSON Lines, a JSON list, CSV or Parquet"),
    ],
)
def test_what_is_damaged_is_refused_in_a_line_that_says_where(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    found = refusal(lambda: rows(tmp_path / name))
    assert found.startswith(str(tmp_path / name)) and said in found


def test_what_is_not_there_or_a_folder_is_refused(tmp_path):
    assert refusal(lambda: rows(tmp_path / "none")) == f"{tmp_path / 'none'}: no such file"
    assert "it is a folder" in refusal(lambda: rows(tmp_path))


@pytest.mark.parametrize("name", ["d.csv", "D.CSV", "d.Csv", "d.tsv", "D.TSV"])
@pytest.mark.parametrize("frame", [b"", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"], ids=["plain", "skippable frame"])
def test_separated_values_are_read_by_their_name_in_any_case(tmp_path, name, frame):
    text = "prompt,completion\nq, a\n".replace(",", "\t" if name.lower().endswith("tsv") else ",")
    content = pyarrow.compress(text.encode(), codec="zstd", asbytes=True)
    (tmp_path / f"{name}.zst").write_bytes(frame + content)
    assert [row for _, row in read_rows(tmp_path / f"{name}.zst")] == [{"prompt": "q", "completion": " a"}]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("d.csv", "a,b,a\n1,2,3\n", "the column 'a' is there twice"),
        ("d.csv", "a\tb\n1\t2\n", "these by"),
        ("d.tsv", "a,b\n1,2\n", "these by"),
        ("d.csv", 'a,b\n"1", "2"\n', "line 2: a blank stands before the quote of 'b'"),
    ],
)
def test_separated_values_that_would_be_misread_are_refused(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    assert reason in refusal(list, read_rows(tmp_path / name))


def test_quoted_text_with_commas_blanks_and_quotes_is_read(tmp_path):
    (tmp_path / "d.csv").write_text('a,b\n"x, ""y""", z\n')
    assert [row for _, row in read_rows(tmp_path / "d.csv")] == [{"a": 'x, "y"', "b": " z"}]
