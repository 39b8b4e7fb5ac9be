"""What every test may ask for: each family's tiny model, a tiny real tokenizer, a corpus, the default parameters."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, ROOT, VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from warm_python import warm_python

from scaleot_core.params import Params, load_params


@pytest.hookimpl(trylast=True)  # once the folders have marked theirs
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let slow tests go first, so that of several processes none is left with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with every byte, so that any text has tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(1, VOCABULARY - 44, (12, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def warm_bin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of programs, `python` and `dvc`, that need not import what stages and DVC import."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    with warm_python({"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **offline}) as folder:
        yield folder
