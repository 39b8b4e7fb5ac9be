"""A file of records is read to the end, or refused by the first record that is of no use."""

import pytest
from helpers import refusal
from private_records import HI, PAIR, read


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no record in it"),
        ([PAIR, "half"], "line 2: not valid JSON"),
        ([PAIR, {"question": "a"}], "line 2: it needs `completion` as in the lines before it"),
        ([{"question": "a"}], "line 1: it needs `prompt` and `completion`, `messages`, or `text`"),
        ([PAIR, {"text": "a"}], "line 2: it needs `completion` as in the lines before it; give all records of a file"),
        ([PAIR, {"completion": "a"}], "line 2: `prompt` is missing"),
        ([{"prompt": "a", "completion": " "}], "line 1: `completion` is missing, empty or no text"),
        ([{"prompt": 1, "completion": "b"}], "line 1: `prompt`"),
        ([{"prompt": "a", "completion": "é" * 200}], " tokens, the context 128; shorten it"),
        ([{"text": ""}], "line 1: `text`"),
        ([{"messages": HI[:1]}], "line 1: there is nothing in it to learn"),
        ([{"messages": "a"}], "line 1: `messages` is a list"),
    ],
)
def test_record_that_is_of_no_use_is_named(tmp_path, bos, rows, message):
    assert message in refusal(lambda: read(tmp_path, bos, *rows, context=128))


def test_model_without_a_chat_template_is_told(tmp_path, bos):
    bos.chat_template = None
    assert "no chat template" in refusal(read, tmp_path, bos, {"messages": HI})


def test_texts_are_packed(tmp_path, bos):
    examples = read(tmp_path, bos, {"text": "hi there"}, {"text": "hello"}, block_size=4)
    targets = [target for example in examples for target in example[1]]
    assert bos.decode(targets) == "hi there</s><s>hello</s>" and len(examples[0][0]) == 4
