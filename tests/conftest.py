"""What every test may ask for: tiny models of all families, a tiny tokenizer, blocks of text, the settings."""

import pytest
import torch
from helpers import CONFIGS, EIGHT, ROOT, VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scaleot_core.params import Params, load_params

QUICK_FAMILIES = {"gpt2", "llama"}  # of a test of every family, `make test-quick` takes these


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: as they stand they may differ between two processes (an archive has its time)."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole pipelines first, so that no process waits in the end for another's."""
    items.sort(key=lambda item: "pipeline" not in item.path.parts)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test of any other family as slow."""
    arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    names = {arguments.get(argument) for argument in ("name", "model", "every_model", "family")} & CONFIGS.keys()
    if names - QUICK_FAMILIES:
        item.add_marker(pytest.mark.slow)


@pytest.fixture(params=EIGHT)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Return a tiny model of each shape of decoder layer."""
    return tiny_model(request.param)


@pytest.fixture(params=sorted(CONFIGS))
def every_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Return a tiny model of each family."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with every byte, so that any text has tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def blocks() -> torch.Tensor:
    """Return twelve blocks of 16 random tokens."""
    return torch.randint(1, VOCABULARY - 44, (12, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture
def params() -> Params:
    """Return the settings of the repository's params.yaml."""
    return load_params(ROOT / "params.yaml")
