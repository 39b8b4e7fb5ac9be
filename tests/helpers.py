"""What several test files use: tiny models and packages, a tiny project, commands run in this process, damage."""

import errno
import hashlib
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from scaleot_core import cli
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json, sha256
from scaleot_core.common.random import generator
from scaleot_core.compression.channels import channels_of, prune_channels
from scaleot_core.compression.emulator import apply_plan, package_tensors
from scaleot_core.compression.layer_choice import ranks_left
from scaleot_core.compression.layer_importance import new_harmonizers
from scaleot_core.compression.plan import COMPRESSED, Layer, LayerKind, Plan, layers_of
from scaleot_core.compression.shapes import layer_shapes
from scaleot_core.compression.svd import svd_factors
from scaleot_core.exchange import adapter_folder
from scaleot_core.exchange.package import save
from scaleot_core.models.families import decoder_layers, family, projection_name
from scaleot_core.models.loading import read_config
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.settings import LoraForm, OffsiteTuning
from scaleot_core.tuning.adapters import TunedLora, trainable
from scaleot_core.tuning.lora import insert_lora
from scaleot_core.tuning.selection import TuningResult

ROOT = Path(__file__).parent.parent
# Real questions, texts and models; tests that need them are skipped where they are not.
TEST_DATA = Path(os.environ.get("SCALEOT_TEST_DATA", ROOT.parent / "shared" / "data"))

# --- tiny models -----------------------------------------------------------------------------------------

CPU = torch.device("cpu")
VOCABULARY = 300
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
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
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "tie_word_embeddings": False, **TOKENS}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, **TOKENS}
FALCON = {key: value for key, value in COMMON.items() if key != "intermediate_size"} | {"ffn_hidden_size": 64}
GROUPED = {**COMMON, "num_key_value_heads": 2}
SLIDING = {**GROUPED, "head_dim": 8, "sliding_window": 16}
MIXED = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}
OPT = {**COMMON, "ffn_dim": 64}

# Every family, and what one of them does in two ways: OPT-350m has its norms behind, and narrower embeddings; Falcon
# has rotary positions and a head of keys for some of queries, or ALiBi and one head of keys for all.
FIELDS: dict[str, dict[str, Any]] = {
    "gpt_neox": COMMON,
    "llama": GROUPED,
    "mistral": SLIDING,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "opt": {**OPT, "word_embed_proj_dim": 32},
    "opt-350m": {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": GPT2,
    "gemma2": SLIDING,
    "gemma3_text": {**SLIDING, **MIXED},
    "bloom": {"n_layer": 4, "n_head": 4, "seq_length": 128, **SHAPE},  # its files have seq_length, its class has not
    "falcon": {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon-alibi": {**FALCON, "alibi": True, "multi_query": True, "parallel_attn": False, "bias": True},
    "gptj": {**GPT2, "rotary_dim": 4, "n_inner": 64},
    "granite": {**GROUPED, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": GROUPED,
    "phi3": {**GROUPED, "original_max_position_embeddings": 128},
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "stablelm": {**GROUPED, "use_qkv_bias": True},
}
TYPES = {"opt-350m": "opt", "falcon-alibi": "falcon"}
CONFIGS: dict[str, PretrainedConfig] = {
    name: AutoConfig.for_model(TYPES.get(name, name), **fields) for name, fields in FIELDS.items()
}
IDS = torch.tensor([[5, 80, 200, 41, 17, 222, 9, 133]])
each_family = pytest.mark.parametrize("name", sorted(CONFIGS))
# One of each shape of decoder layer: what holds for these holds for the others, which differ in their attention alone.
EIGHT = ("bloom", "falcon-alibi", "gemma3_text", "gpt2", "gpt_neox", "llama", "opt-350m", "phi3")
each_shape = pytest.mark.parametrize("name", EIGHT)
each_head = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

_SQUARE = (32, 32)
_GROUPED = {"q_proj": [_SQUARE], "k_proj": [(16, 32)], "v_proj": [(16, 32)], "o_proj": [_SQUARE]}
_EQUAL = {"q_proj": [_SQUARE], "k_proj": [_SQUARE], "v_proj": [_SQUARE], "out_proj": [_SQUARE]}
SHAPES: dict[str, dict[str, list[tuple[int, int]]]] = {  # of every attention matrix (out, in), fused ones apart
    "gpt2": {"c_attn": [_SQUARE] * 3, "c_proj": [_SQUARE]},
    "gpt_neox": {"query_key_value": [_SQUARE] * 3, "dense": [_SQUARE]},
    "bloom": {"query_key_value": [_SQUARE] * 3, "dense": [_SQUARE]},
    "falcon": {"query_key_value": [_SQUARE, (16, 32), (16, 32)], "dense": [_SQUARE]},
    "falcon-alibi": {"query_key_value": [_SQUARE, (8, 32), (8, 32)], "dense": [_SQUARE]},
    "gptj": _EQUAL,
    "gemma2": _GROUPED,
    "gemma3_text": _GROUPED,
    "granite": _GROUPED,
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "olmo2": _GROUPED,
    "opt": _EQUAL,
    "opt-350m": _EQUAL,
    "phi3": {"qkv_proj": [_SQUARE, (16, 32), (16, 32)], "o_proj": [_SQUARE]},
    "qwen2": _GROUPED,
    "qwen3": {"q_proj": [(64, 32)], "k_proj": [(32, 32)], "v_proj": [(32, 32)], "o_proj": [(32, 64)]},
    "smollm3": _GROUPED,
    "stablelm": _GROUPED,
}


def tiny_model(name: str, **changes: object) -> PreTrainedModel:
    """Make a seeded random model of one family: 4 layers of width 32, float32, frozen; or with a changed config."""
    torch.manual_seed(0)
    fields = CONFIGS[name].to_dict()
    if "num_hidden_layers" in changes:  # these lists follow the count
        fields = {key: value for key, value in fields.items() if key not in ("layer_types", "no_rope_layers")}
    config = type(CONFIGS[name]).from_dict({**fields, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # large enough that layers differ and biases count
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    """Open the model in a folder with its layers left on disk."""
    return StreamedModel(folder, read_config(folder), device=CPU, dtype=dtype)


def projections(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Give every attention projection of the decoder layers by its name in the model."""
    layers, names = range(len(decoder_layers(model))), family(model.config).projections
    paths = [projection_name(model.config, i, name) for i in layers for name in names]
    return {path: model.get_submodule(path) for path in paths}


def silence(model: PreTrainedModel, index: int) -> None:
    """Make one decoder layer an identity: whatever is added to the residual stream in it becomes zero."""
    for name, p in decoder_layers(model)[index].named_parameters():
        if any(
            part in name for part in ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense.", "4h_to_h", "fc_out")
        ):
            p.data.zero_()


# a layer that ends in a norm is never an identity
can_be_silent = pytest.mark.parametrize("model", sorted(CONFIGS.keys() - {"opt-350m"}), indirect=True)


def weights_hash(model: nn.Module) -> str:
    """Hash every name and tensor of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# --- tiny emulators, packages and adapters ---------------------------------------------------------------


HARMONIZER_RANK = 8
KINDS: tuple[LayerKind, ...] = ("harmonizer", "adapter", "compressed", "compressed")


def plan_of_kinds(kinds: Sequence[LayerKind], sources: Mapping[int, int] | None = None) -> Plan:
    """Plan layers of these kinds of which none is cut; `sources` are those of shared layers."""
    return tuple(
        Layer(
            kind=kind, harmonizer_rank=HARMONIZER_RANK if kind == "harmonizer" else None, source=(sources or {}).get(i)
        )
        for i, kind in enumerate(kinds)
    )


PLAN = plan_of_kinds(KINDS)
WHOLE = plan_of_kinds(("adapter", "compressed", "compressed", "compressed"))


def plan_of(model: PreTrainedModel, plan: Plan = PLAN, beta: float = 0.8) -> Plan:
    """Give a plan's compressed layers the ranks that β leaves in a model."""
    cut = COMPRESSED.model_copy(update={"ranks": ranks_left(layer_shapes(model), beta)})
    return tuple(cut if layer == COMPRESSED else layer for layer in plan)


def trained_harmonizers(model: PreTrainedModel) -> nn.ModuleList:
    """Make harmonizers with something in them, as if they were trained."""
    harmonizers = new_harmonizers(model.config, HARMONIZER_RANK, seed=0)
    for parameter in harmonizers.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return harmonizers


def give_harmonizers(model: PreTrainedModel, plan: Plan, harmonizers: nn.ModuleList) -> None:
    """Make a model the emulator with these harmonizers."""
    apply_plan(model, plan, svd_factors)
    for i in layers_of(plan, "harmonizer"):
        decoder_layers(model)[i].load_state_dict(harmonizers[i].state_dict())


def make_emulator(model: PreTrainedModel, plan: Plan | None = None) -> Plan:
    """Make a model the emulator of a plan, or of PLAN with β = 0.8; return the plan."""
    plan = plan or plan_of(model)
    give_harmonizers(model, plan, trained_harmonizers(model))
    return plan


def emulator_of(name: str, plan: Plan | None = None, **changes: object) -> PreTrainedModel:
    """Make the emulator of a family's tiny model."""
    model = tiny_model(name, **changes)
    make_emulator(model, plan)
    return model


def write_package(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, plan: Plan | None = None
) -> Path:
    """Turn a model into the emulator and write its package."""
    folder.mkdir()
    plan = make_emulator(model, plan)
    save(folder, model.config, tokenizer, plan, package_tensors(model, plan))
    return folder


class Shipped(NamedTuple):
    """What reading and writing an adapter asks of a package, without its files."""

    meta_model: PreTrainedModel
    sha256: str = "0" * 64
    plan: Plan = PLAN

    @property
    def config(self) -> PretrainedConfig:
        return self.meta_model.config


LORA = LoraForm(rank=3, alpha=5.0, layers="all", modules="all")


def write_adapter(
    folder: Path, model: PreTrainedModel, lora: LoraForm | None, package: Any = None, change: float = 0.02
) -> Path:
    """Write an adapter of an emulator whose parameters have moved at random, as far as tuning moves them or further."""
    package = package or Shipped(model)
    parameters = trainable(model, package.plan, lora, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(change * torch.randn(parameter.shape))
    folder.mkdir()
    tuned = TuningResult([], 1e-3, 7, {})
    adapter_folder.save(folder, package, parameters, lora=lora, tuning=OffsiteTuning(), tuned=tuned)
    return folder


def move_lora(model: PreTrainedModel, plan: Plan = PLAN, lora: LoraForm = LORA) -> TunedLora:
    """Put LoRA into an emulator, where it stays, and move its parameters at random."""
    parameters = insert_lora(model, plan, lora, seed=0)
    draw = generator(1)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].add_(0.1 * torch.randn(parameters[name].shape, generator=draw))
    tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return TunedLora.from_peft(lora, tensors, model.config)


class Pruned(NamedTuple):
    """An emulator that has some feed-forward channels, which they are, and the real model."""

    emulator: PreTrainedModel
    plan: Plan
    kept: dict[int, torch.Tensor]
    real: PreTrainedModel


def pruned_emulator(name: str, beta: float = 0.0, adapter_layer: bool = True) -> Pruned:
    """Make an emulator of a family's tiny model without harmonizers that has 40 channels a compressed layer."""
    emulator, real = tiny_model(name), tiny_model(name)
    second: LayerKind = "adapter" if adapter_layer else "compressed"
    plan = plan_of(real, plan_of_kinds(("compressed", second, "compressed", "compressed")), beta)
    count, draw, pruned = channels_of(real, 0), generator(2), layers_of(plan, "compressed")
    kept = {i: torch.randperm(count, generator=draw)[:40].sort().values for i in pruned}
    apply_plan(emulator, plan, svd_factors)
    for i, channels in kept.items():
        prune_channels(emulator, i, channels)
    plan = tuple(layer.model_copy(update={"channels": 40}) if i in kept else layer for i, layer in enumerate(plan))
    return Pruned(emulator, plan, kept, real)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Give a model's logits of some tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    """Assert that two tensors are equal but for rounding."""
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def change_manifest(folder: Path, **changes: object) -> None:
    """Overwrite keys of the manifest; None takes one out."""
    manifest = {**read_json(folder / "manifest.json"), **changes}
    text = json.dumps({key: value for key, value in manifest.items() if value is not None or key not in changes})
    (folder / "manifest.json").write_text(text)


def list_again(folder: Path, *names: str) -> None:
    """Make the manifest state what files hold now, as one who changes a package on purpose would."""
    files = read_json(folder / "manifest.json")["files"]
    entry = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    change_manifest(folder, files={**files, **entry})


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a private key and its public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


# --- rows of tasks ---------------------------------------------------------------------------------------


def piqa_rows(count: int) -> list[dict[str, object]]:
    """Make small questions in the fields of PIQA's hub data set."""
    return [
        {"goal": f"count to {i}", "sol1": f"say one to {i}", "sol2": f"say {i} to one", "label": i % 2}
        for i in range(count)
    ]


CLOZE: list[dict[str, Any]] = [
    {
        "id": str(i),
        "question": f" What comes after {i}? ",
        "choices": {"label": list("ABCDE"), "text": [f"{i + k} or so" for k in range(5)]},
        "answerKey": "ABCDE"[i % 5],
    }
    for i in range(7)
]
GSM8K = [{"question": f"{i} + 1?", "answer": f"it is {i + 1} #### {i + 1}"} for i in range(5)]
WEBQS: list[dict[str, Any]] = [
    {"url": "", "question": f"where is {i}?", "answers": [f"town {i}", f"city {i}", f"city {i} east"]} for i in range(5)
]
PAGES = [{"page": f"page {i} says\n " + " ".join(str(k * i % 89) for k in range(30 + 25 * i))} for i in range(6)]


# --- a tiny project --------------------------------------------------------------------------------------

PER_TASK = ("offsite_tune", "zero_shot", "full_finetune")


def write_project(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama", **changes: object) -> None:
    """Make `folder` a copy of the pipeline with a tiny model, tiny local data and parameters to match."""
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
        "adapters": ["layers"],
        "data.questions": "tiny-data",
        "data.corpus": "tiny-data/corpus.jsonl",
        "data.block_size": 32,
        "data.train_blocks": 24,
        "data.heldout_blocks": 4,
        "harmonizer.rank": 8,
        "layer_importance.calibration_blocks": 8,
        "layer_importance.steps": 20,
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


def change(folder: Path, **values: object) -> None:
    """Set parameters of the first level, or those in a block given as a dict."""
    params: dict[str, Any] = yaml.safe_load((folder / "params.yaml").read_text())
    for key, value in values.items():
        params[key] = {**params[key], **value} if isinstance(value, dict) else value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


# --- commands and stages in this process -----------------------------------------------------------------


class Ended(NamedTuple):
    """How a command ended: its exit code, its lines on stderr, its stdout."""

    code: int
    said: list[str]
    out: str = ""


def _ended(argv: list[str], action: Callable[[], object]) -> Ended:
    """Run a command in this process. Only SystemExit is caught: anything else would have been a traceback."""
    out, said, argv_before, code = StringIO(), StringIO(), sys.argv, 0
    torch.backends.cuda.enable_flash_sdp(True)  # as in a new process: what ran before chose its own kernel
    try:
        sys.argv = argv
        with redirect_stdout(out), redirect_stderr(said):
            action()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv_before
    return Ended(code, said.getvalue().splitlines(), out.getvalue())


def scaleot(*arguments: object) -> Ended:
    """Run `scaleot` with these arguments."""
    return _ended(["scaleot", *map(str, arguments)], cli.main)


def gives(*arguments: object) -> Any:
    """Give what `scaleot` prints in JSON with these arguments."""
    ended = scaleot(*arguments, "--json")
    assert ended.code == 0, ended.said
    return json.loads(ended.out)


def refused(*arguments: object) -> str:
    """Give the one line in which `scaleot` ends with these arguments."""
    ended = scaleot(*arguments)
    assert ended.code == 1 and ended.out == "", ended
    assert [line for line in ended.said if line.startswith("error: ")] == ended.said[-1:], ended.said
    return ended.said[-1]


def command(stage: str) -> list[str]:
    """Give the arguments of Python that run a stage."""
    item = ["piqa", "layers"] if stage == "offsite_tune" else ["piqa"] if stage in PER_TASK else []
    return [f"stages/{stage}.py", *item]


def run(folder: Path, stage: str, arguments: list[str] | None = None) -> Ended:
    """Run a stage of a project."""
    argv = command(stage) if arguments is None else [f"stages/{stage}.py", *arguments]
    with chdir(folder):
        return _ended(argv, lambda: runpy.run_path(argv[0], run_name="__main__"))


def succeed(folder: Path, *stages: str) -> list[str]:
    """Run stages of a project that end well; give their lines."""
    said = []
    for stage in stages:
        ended = run(folder, stage)
        assert ended.code == 0, ended.said
        said += ended.said
    return said


# --- what is left behind, and what goes wrong ------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Read everything below a folder, hidden temporary files too: a file's bytes by its path, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refusal(action: Callable[..., Any], *args: Any) -> str:
    """Give the one line that a user reads."""
    with pytest.raises(UserError) as caught:
        action(*args)
    assert "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file from here on take half of what it is given, then let the disk be full."""

    def write(path: Path, content: Any, **options: Any) -> None:
        with path.open("wb") as stream:
            stream.write(bytes(content.encode() if isinstance(content, str) else content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(Path, "write_bytes", write)


@contextmanager
def dies_after(
    module: ModuleType, name: str, calls: int, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[None]:
    """For the length of a block let a function of a module raise `error` once it was called so often."""
    function, seen = getattr(module, name), count(1)

    def until(*args: Any) -> Any:
        if next(seen) > calls:
            raise error
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, until)
        yield
