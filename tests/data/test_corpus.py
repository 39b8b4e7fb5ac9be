"""Public text: what is read, and how it is packed into blocks."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import TEST_DATA
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.errors import UserError
from scaleot_core.data import corpus

SIZES: dict[str, Any] = {"block_size": 16, "train_blocks": 20, "heldout_blocks": 5, "seed": 0}


def texts(count: int) -> list[str]:
    return [f"passage {i} says {i * i} and then {i + 7}" for i in range(count)]


def passages_in(blocks: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The passages in some blocks without the last, which may be cut."""
    return [text.strip() for text in str(tokenizer.decode(blocks.flatten().tolist())).split("<eos>")[:-1]]


def test_blocks_are_what_was_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    train, heldout = corpus.pack(texts(60), tokenizer, **SIZES)
    assert train.shape == (20, 16) and heldout.shape == (5, 16)
    assert train.dtype == heldout.dtype == torch.int32
    assert tokenizer.eos_token_id in train


def test_a_passage_that_comes_again_is_packed_once(tokenizer: PreTrainedTokenizerFast) -> None:
    given = texts(16)  # just enough, so that repeats would be drawn
    for seed in range(5):
        parts = corpus.pack([*given, *(f" {text} " for text in given)], tokenizer, **{**SIZES, "seed": seed})
        packed = [passage for part in parts for passage in passages_in(part, tokenizer)]
        assert len(packed) >= 8 and set(packed) <= set(given)
        assert len(set(packed)) == len(packed)


def test_seed_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (corpus.pack(texts(60), tokenizer, **{**SIZES, "seed": seed}) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_heldout_blocks_do_not_hang_on_the_training_size(tokenizer: PreTrainedTokenizerFast) -> None:
    small, large = (corpus.pack(texts(60), tokenizer, **{**SIZES, "train_blocks": n}) for n in (5, 20))
    assert torch.equal(small[1], large[1])
    assert torch.equal(small[0], large[0][:5])


def test_an_endless_stream_is_read_in_bounds(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SHUFFLED", 50)
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"passage {read} of many"

    corpus.pack(endless(), tokenizer, **SIZES)
    assert 50 <= read < 50 + 25 * 16


def test_a_long_stream_gives_every_passage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHUFFLED", 10)
    drawn = list(corpus._shuffled(texts(35), 0))
    assert drawn != texts(35) and sorted(drawn) == sorted(texts(35))


@pytest.mark.parametrize("empty", [[], ["", " \n "]])
def test_empty_corpus(tokenizer: PreTrainedTokenizerFast, empty: list[str]) -> None:
    with pytest.raises(UserError, match="no text"):
        corpus.pack(empty, tokenizer, **SIZES)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [({"train_blocks": 900}, "data.train_blocks"), ({"heldout_blocks": 900}, "data.heldout_blocks")],
)
def test_too_little_text_names_the_parameter(
    tokenizer: PreTrainedTokenizerFast, changes: dict[str, int], parameter: str
) -> None:
    with pytest.raises(
        UserError, match=rf"{parameter} = 900: the corpus gives \d+ blocks of 16 tokens.*lower {parameter}"
    ):
        corpus.pack(texts(60), tokenizer, **{**SIZES, **changes})


def test_tokenizer_without_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="end-of-text"):
        corpus.pack(texts(60), bare, **SIZES)


def test_reads_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two", "more": 1}\n')
    assert list(corpus.read_text(str(file))) == ["one", "two"]


@pytest.mark.parametrize("row", [{"page": "x"}, {"text": 3}, {"text": None}])
def test_row_without_text_is_named(tmp_path: Path, row: dict[str, object]) -> None:
    """By the line of one's own file, in which a blank one counts."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n\n" + json.dumps(row))
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: the field `text`"):
        list(corpus.read_text(str(file)))


def test_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nhalf')
    with pytest.raises(UserError, match="line 2"):
        list(corpus.read_text(str(tmp_path / "a.jsonl")))


def test_reads_txt_parted_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nstill one\n\ntwo\n \t\n\nthree")
    assert list(corpus.read_text(str(tmp_path / "a.txt"))) == ["one\nstill one", "two", "three"]


def compressed(text: str) -> bytes:
    return pyarrow.compress(text.encode(), codec="zstd", asbytes=True)


def test_reads_compressed_shards_in_order(tmp_path: Path) -> None:
    """The Pile's shards may hold several frames one after another."""
    shards = [[json.dumps({"text": f"{shard} {i}", "meta": {}}) + "\n" for i in range(50)] for shard in range(2)]
    for shard, rows in enumerate(shards):
        frames = compressed("".join(rows[:20])) + compressed("".join(rows[20:]))
        (tmp_path / f"0{shard}.jsonl.zst").write_bytes(frames)
    (tmp_path / "README.md").write_text("no text of the corpus")
    assert list(corpus.read_text(str(tmp_path))) == [f"{shard} {i}" for shard in range(2) for i in range(50)]


@pytest.mark.slow
def test_shard_is_not_read_to_its_end_before_it_is_needed(tmp_path: Path) -> None:
    sound = compressed("".join(json.dumps({"text": f"{i} {i**9}"}) + "\n" for i in range(200_000)))
    (tmp_path / "a.jsonl.zst").write_bytes(sound[: len(sound) // 2])
    stream = corpus.read_text(str(tmp_path / "a.jsonl.zst"))
    assert next(stream) == "0 0"
    with pytest.raises(UserError, match=r"a\.jsonl\.zst"):
        list(stream)


def test_damaged_shard(tmp_path: Path) -> None:
    """What a file is its content says: the first is compressed and damaged, the second isn't compressed at all."""
    (tmp_path / "a.jsonl.zst").write_bytes(compressed("x")[:4] + b"nothing of the kind")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: it can't be read"):
        list(corpus.read_text(str(tmp_path / "a.jsonl.zst")))
    (tmp_path / "b.jsonl.zst").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"b\.jsonl\.zst, line 1: not valid JSON"):
        list(corpus.read_text(str(tmp_path / "b.jsonl.zst")))


def test_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.csv, \.tsv, \.parquet or \.txt file is in that folder"):
        list(corpus.read_text(str(tmp_path)))


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.zst", "none.txt", "none.TXT", "none.parquet"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(corpus.read_text(str(tmp_path / name)))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ncaf\xe9")
    with pytest.raises(UserError, match=r"a\.txt, line 3: not UTF-8"):
        list(corpus.read_text(str(tmp_path / "a.txt")))


ROWS = [{"text": "one"}, {"text": "two\nlines"}]
LINES = "\n".join(map(json.dumps, ROWS))
PLAIN = "one\n\ntwo\nlines"
FILES: dict[str, bytes] = {
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.JSONL": LINES.encode(),
    "a.json": json.dumps(ROWS).encode(),
    "a.Json.GZ": gzip.compress(json.dumps(ROWS, indent=2).encode()),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "bom.txt": b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode(),
    "a.TXT": PLAIN.encode(),
    "a.txt.gz": gzip.compress(PLAIN.encode()),
    "a.txt.zst": compressed(PLAIN),
    "windows.txt": b"\xff\xfe" + PLAIN.encode("utf-16-le"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_is_read_as_others_write_it_and_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(corpus, "_stream", lambda *args: pytest.fail("it was looked for on the hub"))
    (tmp_path / name).write_bytes(FILES[name])
    assert list(corpus.read_text(str(tmp_path / name))) == ["one", "two\nlines"]
    (tmp_path / f"._{name}").write_bytes(b"what macOS puts beside it")
    assert list(corpus.read_text(str(tmp_path))) == ["one", "two\nlines"]


def test_parquet_is_read_and_its_row_named(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS), ("b", [*ROWS, {"text": None}])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert list(corpus.read_text(str(tmp_path / "a.parquet"))) == ["one", "two\nlines"]
    with pytest.raises(UserError, match=r"b\.parquet, row 3: the field `text`"):
        list(corpus.read_text(str(tmp_path / "b.parquet")))


@pytest.mark.parametrize("name", ["a.md", "corpus"])
def test_file_of_no_known_kind_is_told_and_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(corpus, "_stream", lambda *args: pytest.fail("it was looked for on the hub"))
    (tmp_path / name).write_text("some text")
    with pytest.raises(UserError, match=rf"^data\.corpus = '.*{name}': of no kind that is read: .*\.txt"):
        list(corpus.read_text(str(tmp_path / name)))


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **options: rows()))


def test_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, lambda: iter([{"text": "one"}, {"text": "two"}]))
    assert list(corpus.read_text("some/corpus")) == ["one", "two"]


def test_hub_data_set_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("gone\nand more")

    fake_datasets(monkeypatch, broken)
    with pytest.raises(UserError, match=r"data\.corpus = 'some/corpus': it can't be loaded \(gone\)$"):
        list(corpus.read_text("some/corpus"))


@pytest.mark.skipif(not (TEST_DATA / "pile_sample").is_dir(), reason="the lab data isn't here")
def test_real_text_packs(tokenizer: PreTrainedTokenizerFast) -> None:
    given = corpus.read_text(str(TEST_DATA / "pile_sample" / "validation.jsonl"))
    train, heldout = corpus.pack(given, tokenizer, **SIZES)
    assert train.shape == (20, 16) and heldout.shape == (5, 16)
