"""A text has the tokens that the model sees in use, whatever its tokenizer puts around it."""

import copy

import pytest
from helpers import refusal
from private_records import build, learnt, read, tokens_of
from tokenizers import normalizers

from scaleot_core.tuning.examples import IGNORED


def prompt_tokens(tokenizer, prompt):
    """The tokens of a prompt as the model gets it in use, and as it does where an EOS isn't put behind every text."""
    tokens = tokenizer(prompt)["input_ids"]
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else tokens


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("hi", " hello there"),
        ("the cap", "ital"),  # one word, whose pieces join
        ("1+1", "1+1?"),
        ("the answer is ", "two"),  # as prompts often end
        ("hi\n\n", "hello"),
        ("hi\n", "\nhello"),
        ("hi", "\nhello"),
        ("é 😀", "😀 é"),
        ("  ", "hello"),
        ("hi", "   hello"),
    ],
)
def test_prompt_has_the_tokens_of_use_and_all_of_the_completion_is_learnt(tmp_path, kind, prompt, completion):
    (example,) = read(tmp_path, kind, {"prompt": prompt, "completion": completion})
    before = prompt_tokens(kind, prompt)
    assert tokens_of(example)[: len(before)] == before and learnt(example) == tokens_of(example)[len(before) :]
    assert learnt(example)[-1] == kind.eos_token_id and kind.eos_token_id not in learnt(example)[:-1]
    ends = (kind.bos_token_id, kind.eos_token_id)
    text = kind.decode([token for token in tokens_of(example)[:-1] if token not in ends])
    assert text.strip() == f"{prompt}{completion}".strip()
    assert len(learnt(example)) > 1 and kind.decode(learnt(example)[:-1]).strip() in completion


def test_empty_prompt_is_what_a_text_begins_with(tmp_path, kind):
    (example,) = read(tmp_path, kind, {"prompt": "", "completion": "hello there"})
    assert example[0][0] == (kind.eos_token_id if kind.bos_token_id is None else kind.bos_token_id)
    assert IGNORED not in example[1] and kind.decode(learnt(example)).strip() == "hello there</s>"


@pytest.mark.parametrize("end", ["</s>", "</s>\n", " </s></s>", "</s> \n</s>"])
def test_one_end_is_learnt_where_the_record_brings_its_own(tmp_path, kind, end):
    for row in ({"prompt": "hi", "completion": f" hello{end}"}, {"text": f"hi hello{end}"}):
        (example,) = read(tmp_path, kind, row)
        assert tokens_of(example).count(kind.eos_token_id) == 1 + (kind.bos_token == kind.eos_token)
        assert tokens_of(example)[-1] == kind.eos_token_id


@pytest.mark.parametrize("text", ["<s>[INST] hi [/INST] hello </s>", "<s>hi"])
def test_no_second_bos_stands_before_a_text_that_has_one(tmp_path, kind, text):
    for row in ({"text": text}, {"prompt": text, "completion": " hello"}):
        (example,) = read(tmp_path, kind, row)
        assert tokens_of(example).count(kind.convert_tokens_to_ids("<s>")) == 1


@pytest.mark.parametrize("completion", ["</s>", " </s>\n"])
def test_completion_that_says_nothing_is_refused(tmp_path, kind, completion):
    row = {"prompt": "hi", "completion": completion}
    assert "line 1: there is nothing in it to learn" in refusal(read, tmp_path, kind, row)


def test_completion_without_a_token_of_its_own_is_refused(tmp_path):
    deaf = copy.deepcopy(build("bare"))
    deaf.backend_tokenizer.normalizer = normalizers.Replace("☎", "")
    assert "nothing in it to learn" in refusal(read, tmp_path, deaf, {"prompt": "hi", "completion": "☎"})
    assert "nothing in it to learn" in refusal(read, tmp_path, deaf, {"text": "☎"})
