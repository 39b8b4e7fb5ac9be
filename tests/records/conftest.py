"""Tokenizers that tests may give a chat template."""

import copy

import pytest
from private_records import build
from tokenizer_kinds import KINDS, STABLE


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return copy.deepcopy(build(request.param))


@pytest.fixture
def bos():
    """LLaMA 3's kind: the post-processor adds a BOS, and takes spaces off the offsets."""
    tokenizer = copy.deepcopy(build("bos"))
    tokenizer.chat_template = STABLE["chatml"]
    return tokenizer
