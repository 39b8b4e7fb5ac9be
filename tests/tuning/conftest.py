"""A few questions as examples, and settings that tune a tiny model on them."""

import pytest
from helpers import piqa_rows, tiny_model

from scaleot_core.tuning.examples import from_task


@pytest.fixture
def data(tokenizer):
    return from_task(tiny_model("llama"), tokenizer, "piqa", piqa_rows(9), block_size=16)


@pytest.fixture
def settings(params):
    return params.offsite_tune.model_copy(update={"epochs": 3, "batch_size": 4, "max_steps": 0})
