"""Tiny real configurations of every family, a tiny real tokenizer, and the lab data where it is present."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from scaleot_core.params import HarmonizerForm, Params, load_params

ROOT = Path(__file__).parent.parent
LAB = ROOT.parent / "shared" / "data"
VOCABULARY = 300
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    **TOKENS,
}

# Every family, and what one of them does in two ways: OPT-350m has its norms behind, and narrower embeddings.
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "llama": LlamaConfig(num_key_value_heads=2, **COMMON),
    "mistral": MistralConfig(num_key_value_heads=2, head_dim=8, sliding_window=16, **COMMON),
    "qwen2": Qwen2Config(num_key_value_heads=2, **COMMON),
    "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=16, **COMMON),
    "opt": OPTConfig(word_embed_proj_dim=32, ffn_dim=64, **COMMON),
    "opt-350m": OPTConfig(word_embed_proj_dim=16, ffn_dim=64, do_layer_norm_before=False, **COMMON),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=128, **TOKENS),
}


def tiny_model(name: str, **changes: object) -> PreTrainedModel:
    """A seeded random model of one family: 4 layers of width 32, float32, frozen."""
    torch.manual_seed(0)
    fields = {key: value for key, value in CONFIGS[name].to_dict().items() if key != "layer_types"}  # follow the count
    config = type(CONFIGS[name]).from_dict({**fields, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # large enough that layers differ and biases count
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


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


def form(rank: int) -> HarmonizerForm:
    """The form of harmonizers in tests."""
    return HarmonizerForm(rank=rank)


def piqa_rows(count: int) -> list[dict[str, object]]:
    """Small questions in the fields of PIQA's hub data set."""
    return [
        {"goal": f"count to {i}", "sol1": f"say one to {i}", "sol2": f"say {i} to one", "label": i % 2}
        for i in range(count)
    ]


@contextmanager
def dies_after(
    module: ModuleType, name: str, calls: int, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[None]:
    """For the length of a block a function of a module raises `error` once it was called so often."""
    function, seen = getattr(module, name), count(1)

    def until(*args: Any) -> Any:
        if next(seen) > calls:
            raise error
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, until)
        yield


def write_project(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama", **changes: object) -> None:
    """Make `folder` a copy of the pipeline with a tiny model, tiny local data and parameters to match."""
    import shutil

    import yaml

    for name in ("stages", "dvc.yaml", "params.yaml", "embedded.lock", ".dvcignore", ".gitignore", "scaleot_core"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder / name)
    tiny_model(family).save_pretrained(folder / "tiny-model")
    tokenizer.save_pretrained(folder / "tiny-model")
    (folder / "tiny-data" / "piqa").mkdir(parents=True)
    rows = piqa_rows(60)
    for name, part in (("train", rows[:40]), ("validation", rows[40:])):
        (folder / "tiny-data" / "piqa" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    text = [{"text": f"passage {i} " + " ".join(str(i * k % 97) for k in range(60))} for i in range(80)]
    (folder / "tiny-data" / "corpus.jsonl").write_text("\n".join(map(json.dumps, text)))
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    small = {
        "model": "tiny-model",
        "tasks": ["piqa"],
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "adapter_layers": 1,
        "data.questions": "tiny-data",
        "data.corpus": "tiny-data/corpus.jsonl",
        "data.block_size": 32,
        "data.train_blocks": 24,
        "data.heldout_blocks": 4,
        "harmonizer.rank": 8,
        "layer_importance.calibration_blocks": 8,
        "layer_importance.steps": 20,
        "layer_importance.batch_tokens": 64,
        "layer_importance.sensitivity_blocks": 2,
        "dlr.steps": 10,
        "dlr.score_interval": 5,
        "dlr.score_blocks": 4,
        "offsite_tune.epochs": 2,
        "full_finetune.epochs": 1,
        **changes,
    }
    for key, value in small.items():
        *blocks, last = key.split(".")
        target = values
        for block in blocks:
            target = target[block]
        target[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
