"""The emulator package: how it is written, checked and read back.

A folder of safetensors, the tokenizer's files and one manifest.json. It holds everything that the data owner needs, and
it is all that the data owner needs.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from accelerate import init_empty_weights
from pydantic import Field
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from scaleot_core import handover
from scaleot_core.decomposition import shapes
from scaleot_core.emulator import part_of, stand_in
from scaleot_core.errors import UserError, one_line, printable
from scaleot_core.families import FAMILIES, family
from scaleot_core.files import Shapes, TensorWriter, read_json, write_json
from scaleot_core.handover import MANIFEST, TOKENIZER_FILES
from scaleot_core.models import run_stack
from scaleot_core.params import HarmonizerForm, Share
from scaleot_core.plan import Cut, Kind, Plan
from scaleot_core.runtime import DTYPES

FORMAT: Final = "scaleot-emulator"
FORMAT_VERSION: Final = 2
UNSTATED = "not stated: ask the model owner"
LONGEST_LICENCE = 1000  # characters
TOKENIZER_SETTINGS = {
    "add_prefix_space",
    "additional_special_tokens",
    "backend",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "eos_token",
    "extra_special_tokens",
    "mask_token",
    "model_max_length",
    "pad_token",
    "padding_side",
    "tokenizer_class",
    "unk_token",
}  # of a tokenizer_config.json: none names a file, code or a repository
PROBE = "The 2nd «naïve» test,\n\tof 3.14 words: 你好!  <|x|>"  # on which a tokenizer must be what it was
LARGEST_BUFFERS = 2**24  # numbers: those that a model computes for itself, as rotary frequencies
PARTS = ("base", "adapter", "harmonizer", "compressed")  # a package's files of tensors
FILES = (*(f"{part}.safetensors" for part in PARTS), *TOKENIZER_FILES)


class PackageManifest(handover.Manifest):
    """A package's manifest: what tuning needs to know, and no more."""

    format: Literal["scaleot-emulator"] = FORMAT
    format_version: Literal[2] = FORMAT_VERSION
    licence: Annotated[str, Field(max_length=LONGEST_LICENCE)]
    """Under which the package is shipped."""
    architecture: dict[str, Any]
    """The model's configuration, as transformers has it."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of every tensor."""
    layers: Annotated[tuple[Kind, ...], Field(min_length=1, max_length=1024)]
    """What became of each decoder layer."""
    beta: Share
    """β, which says with `rank_semantics` the ranks of the compressed layers."""
    rank_semantics: Literal["removed", "kept"]
    harmonizer: HarmonizerForm
    like: Annotated[dict[int, int], Field(max_length=1024, default_factory=dict)]
    """Whose weights each shared layer has."""
    cuts: Annotated[dict[int, Cut], Field(max_length=1024, default_factory=dict)]
    """How far layers are cut that β doesn't cut."""


def tensors_of(model: PreTrainedModel, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """What a package has of an emulator, by its names: a tied head once, and a shared layer where it comes from."""
    path, tied = family(model.config).layers, set(model.all_tied_weights_keys)
    return ((n, t) for n, t in model.state_dict().items() if n not in tied and part_of(n, path, plan) in PARTS)


def save(
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    tensors: Iterable[tuple[str, Tensor]],
    licence: str = UNSTATED,
) -> None:
    """Write an emulator as a package into an existing, empty folder, one tensor after the other.

    `config` is the model's, in the package's dtype. ValueError for a tensor that is missing or doesn't belong there.
    """
    path = family(config).layers
    expected = _expected(_empty(config, plan, buffers_too=True), plan)
    files = {part: TensorWriter(folder / f"{part}.safetensors", those) for part, those in expected.items()}
    for name, tensor in tensors:
        part = part_of(name, path, plan)
        if part not in files:
            raise ValueError(f"tensor {name!r} is of a {part} layer, of which a package has none")
        files[part].write(name, tensor)
    for file in files.values():
        file.check_whole()
    _save_tokenizer(folder, tokenizer)
    known = _settings(config.model_type)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "licence": licence,
        "architecture": {key: value for key, value in config.to_dict().items() if key in known},
        "dtype": str(config.dtype).removeprefix("torch."),
        "layers": list(plan.kinds),
        "beta": plan.beta,
        "rank_semantics": plan.rank_semantics,
        "harmonizer": plan.harmonizer.model_dump(),
        "like": {str(i): other for i, other in plan.like.items()},
        "cuts": {str(i): cut.model_dump(mode="json") for i, cut in plan.cuts.items()},
    }
    handover.write(folder, manifest)


def read_manifest(folder: Path) -> PackageManifest:
    """The manifest of a package, after every file that it lists was found whole; UserError otherwise."""
    return handover.read(folder, PackageManifest, FILES)


def plan_of(manifest: PackageManifest) -> Plan:
    """The layer plan that a manifest states; ValueError for one that makes no sense."""
    if "adapter" not in manifest.layers:
        raise ValueError("no layer is an adapter layer")
    form, beta = manifest.harmonizer, manifest.beta
    return Plan(manifest.layers, beta, manifest.rank_semantics, form, manifest.like, manifest.cuts)


def _settings(model_type: str) -> set[str]:
    """What a configuration of an architecture may say: what transformers' own class has, but where it came from."""
    return set(AutoConfig.for_model(model_type).to_dict()) - {"_name_or_path"}


def _config(manifest: PackageManifest) -> PretrainedConfig:
    """The configuration that a manifest states: plain settings of a supported architecture and no others.

    What would make transformers fetch or run something, such as `auto_map`, `attn_implementation` or
    `quantization_config`, is none of them.
    """
    fields = dict(manifest.architecture)
    name = fields.pop("model_type", None)
    if name not in FAMILIES:
        raise ValueError(f"architecture {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    foreign = sorted(fields.keys() - _settings(name))
    if foreign:
        raise ValueError(f"`{foreign[0]}` is no setting of {name}")
    count = CONFIG_MAPPING[name].attribute_map.get("num_hidden_layers", "num_hidden_layers")
    stated = {fields.get(count), fields.get("num_hidden_layers", fields.get(count))}
    if stated != {len(manifest.layers)}:  # before a configuration of so many layers is made
        raise ValueError(f"`layers` has {len(manifest.layers)} kinds, the architecture {fields.get(count)!r}")
    return AutoConfig.for_model(name, **{**fields, "dtype": DTYPES[manifest.dtype]})


def _empty(config: PretrainedConfig, plan: Plan, *, buffers_too: bool) -> PreTrainedModel:
    """An emulator without weights; buffers are computed, unless they too are to take no memory."""
    with init_empty_weights(include_buffers=buffers_too):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        stand_in(model, plan, shapes)
    return model


def _expected(model: PreTrainedModel, plan: Plan) -> dict[str, Shapes]:
    """What each file of a package has of an emulator: names, shapes and dtypes of its tensors."""
    path = family(model.config).layers
    found: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, tensor in tensors_of(model, plan):
        found.setdefault(part_of(name, path, plan), {})[name] = (tuple(tensor.shape), tensor.dtype)
    return dict(found)


def plan_bytes(config: PretrainedConfig, plan: Plan) -> int:
    """Bytes of the tensors that a package of a model with this plan has."""
    parts = _expected(_empty(config, plan, buffers_too=True), plan).values()
    return sum(math.prod(shape) * dtype.itemsize for part in parts for shape, dtype in part.values())


def assemble(
    config: PretrainedConfig, plan: Plan, tensors: Iterable[tuple[str, Tensor]], *, device: torch.device
) -> PreTrainedModel:
    """An emulator, frozen, from its tensors, which are all that a package has."""
    model, found = _empty(config, plan, buffers_too=False), dict(tensors)
    path = family(config).layers
    for other in set(plan.like.values()):  # one copy for all that share it: an adapter layer's own will move
        own = f"{path}.{other}."
        copies = {name.removeprefix(own): t.clone() for name, t in found.items() if name.startswith(own)}
        for i in (i for i, source in plan.like.items() if source == other):
            found |= {f"{path}.{i}.{name}": tensor for name, tensor in copies.items()}
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def outline(folder: Path) -> tuple[PackageManifest, PreTrainedModel, dict[Path, Shapes]]:
    """A package's manifest, its model without weights, and the tensors that each of its files must have.

    UserError where the manifest describes no model. Of the files nothing but hashes was read.
    """
    manifest = read_manifest(folder)
    try:
        plan = plan_of(manifest)
        model = _empty(_config(manifest), plan, buffers_too=True)
        buffers = sum(buffer.numel() for buffer in model.buffers())
        if buffers > LARGEST_BUFFERS:
            raise ValueError(f"its buffers would have {buffers:,} numbers")
    except Exception as error:  # whatever a manifest that makes no sense leads to
        raise UserError(f"{folder}/{MANIFEST}: it describes no model ({one_line(error)}); fetch it again") from error
    expected: dict[Path, Shapes] = {folder / name: {} for name in manifest.files if name.endswith(".safetensors")}
    expected |= {folder / f"{part}.safetensors": tensors for part, tensors in _expected(model, plan).items()}
    return manifest, model, expected


def load(folder: Path, *, device: torch.device) -> tuple[PreTrainedModel, Plan]:
    """Read a package as a model, frozen, and its plan.

    The model is built from the manifest's configuration with no weights, its layers are replaced as the plan says,
    and every tensor must then be in the files, by name, shape and dtype, and nothing else.
    """
    manifest, _, expected = outline(folder)
    plan = plan_of(manifest)
    tensors = handover.read_tensors(expected)
    model = assemble(_config(manifest), plan, tensors.items(), device=device)
    try:
        with torch.no_grad():
            run_stack(model, torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # whatever settings that don't go together lead to
        raise UserError(f"{folder}/{MANIFEST}: its model doesn't run ({one_line(error)}); fetch it again") from error
    return model, plan


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer so that `load_tokenizer` takes it; UserError where it would not be what it was."""
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "TokenizersBackend"}
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if k in TOKENIZER_SETTINGS})
    again = load_tokenizer(folder)
    if again(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"] or again.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            "the model's tokenizer is more than its tokenizer.json says, so it can't be shipped; use another"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a package, from its tokenizer.json; UserError where it isn't sound or asks for more."""
    settings = handover.read_untrusted_json(folder / "tokenizer_config.json")
    if not isinstance(settings, dict) or settings.get("tokenizer_class") != "TokenizersBackend":
        raise UserError(f"{folder}/tokenizer_config.json: not that of a package's tokenizer; fetch it again")
    if foreign := sorted(settings.keys() - TOKENIZER_SETTINGS):
        raise UserError(f"{folder}/tokenizer_config.json: `{printable(foreign[0])}` has no place there; fetch it again")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: 'tokenizer.json' is missing; fetch it again")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # a damaged file may end in a panic of the tokenizers library, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{folder}: the tokenizer can't be loaded ({one_line(error)}); fetch it again") from error
