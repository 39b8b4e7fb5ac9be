"""What of the records isn't learnt is told, and where."""

from helpers import refusal
from private_records import HI, PAIR, read
from tokenizer_kinds import STABLE


def test_records_that_are_cut_are_named(tmp_path, bos, capsys):
    far = {"prompt": "far " * 200, "completion": "hello"}
    examples = read(tmp_path, bos, PAIR, far, *[PAIR, far] * 6, context=128)
    assert examples.tally.cut == 7
    line = capsys.readouterr().err
    assert "own.jsonl: 7 of 14 records are too long for the model's context of 128 tokens" in line
    assert "(line 2, line 4, line 6, line 8, line 10 and 2 more)" in line


def test_fields_that_are_not_read_are_told(tmp_path, bos, capsys):
    named = [{**HI[0], "name": "Ann"}, HI[1]]
    examples = read(tmp_path, bos, {"messages": HI, "id": 1}, {"messages": named, "id": 2, "source": "a"})
    assert examples.tally.ignored == {"id": 2, "source": 1, "messages: name": 1}
    assert "fields that are not read" in capsys.readouterr().err
    bos.chat_template = STABLE["chatml"].replace("{{ m.role }}", "{{ m.role }}{{ m.name }}")
    assert read(tmp_path, bos, {"messages": named}).tally.ignored == {}


def test_prompt_that_goes_by_the_chat_template_is_told_once(tmp_path, bos, capsys):
    read(tmp_path, bos, PAIR, PAIR)
    assert capsys.readouterr().err.count("without the model's chat template") == 1
    read(tmp_path, bos, {"messages": HI})
    bos.chat_template = None
    read(tmp_path, bos, PAIR)
    assert "chat template" not in capsys.readouterr().err
    error = refusal(read, tmp_path, bos, {"instruction": "a", "input": "", "output": "b"})
    assert "this is Alpaca's form; write `prompt`" in error
