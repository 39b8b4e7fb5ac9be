"""What every test may ask for: each family's tiny model, a tiny real tokenizer, a corpus, the default parameters."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import CONFIGS, ROOT, VOCABULARY, tiny_model
from remembered import remember, remember_task_index
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scaleot_core.params import Params, load_params
from scaleot_core.settings import OffsiteTuning
from scaleot_core.tuning import privacy


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: as they stand they may differ between two processes (an archive has its time)."""
    return argname if isinstance(val, bytes) else None


# The files that take longest, the longest first: what is begun last must be short, or one process waits for the other.
LONGEST = (
    "test_pipeline",
    "test_stages",
    "test_same_as_lm_eval",
    "test_methods",
    "test_parallel",
    "test_cli",
    "test_privacy",
    "test_lora",
    "test_adapter",
    "test_shards",
    "test_machines",
    "test_experiments",
)
QUICK_FAMILIES = {"gpt2", "llama"}  # of a test of every family, `make test-quick` takes these


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test of any other family as slow."""
    others = [name for name in CONFIGS if name not in QUICK_FAMILIES]
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if any(given.get(name) in others for name in ("name", "model", "family")):
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)  # after those that leave tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files go first."""
    order = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Let no search for garbage go through all that was imported, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def once() -> Iterator[None]:
    """What takes long, and is the same whoever asks, is worked out once a process, or not where nobody reads it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("noise_multiplier", "spent"):
            patch.setattr(privacy, name, _accounted_once(getattr(privacy, name)))
        remember(patch)
        yield


def _accounted_once(account: Callable[..., float]) -> Callable[..., float]:
    """Ask the accountant of DP-SGD once for the same promise, sampling and noise: a second or more each."""
    found: dict[tuple[Any, ...], float] = {}

    def asked(tuning: OffsiteTuning, **sampling: float) -> float:
        key = (tuning.epsilon, tuning.delta, *sorted(sampling.items()))
        if key not in found:
            found[key] = account(tuning, **sampling)
        return found[key]

    return asked


@pytest.fixture(scope="session")
def task_index() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        remember_task_index(patch)
        yield


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
