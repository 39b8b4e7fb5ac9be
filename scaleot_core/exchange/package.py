"""The emulator package: how it is written, checked and read back.

A folder of safetensors, the tokenizer's files and one manifest.json. It holds everything that the data owner needs, and
it is all that the data owner needs.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scaleot_core.common.errors import UserError, one_line
from scaleot_core.common.runtime import DTYPES
from scaleot_core.common.tensors import Shapes, TensorWriter
from scaleot_core.compression.emulator import PARTS, assemble, meta_emulator, part_of, tensor_shapes
from scaleot_core.compression.plan import Cut, LayerKind, Plan
from scaleot_core.exchange import untrusted
from scaleot_core.exchange.manifest import MANIFEST, TOKENIZER_FILES, Manifest, read_checked, write_manifest
from scaleot_core.exchange.tokenizer import save_tokenizer
from scaleot_core.models.families import FAMILIES, family
from scaleot_core.models.forward import last_hidden_state
from scaleot_core.params import Fraction, HarmonizerForm

FORMAT: Final = "scaleot-emulator"
FORMAT_VERSION: Final = 2
UNSTATED = "not stated: ask the model owner"
LONGEST_LICENCE = 1000  # characters
LARGEST_BUFFERS = 2**24  # numbers: those that a model computes for itself, as rotary frequencies
FILES = (*(f"{part}.safetensors" for part in PARTS), *TOKENIZER_FILES)


class PackageManifest(Manifest):
    """A package's manifest: what tuning needs to know, and no more."""

    format: Literal["scaleot-emulator"] = FORMAT
    format_version: Literal[2] = FORMAT_VERSION
    licence: Annotated[str, Field(max_length=LONGEST_LICENCE)]
    """Under which the package is shipped."""
    architecture: dict[str, Any]
    """The model's configuration, as transformers has it."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of every tensor."""
    layers: Annotated[tuple[LayerKind, ...], Field(min_length=1, max_length=1024)]
    """What became of each decoder layer."""
    beta: Fraction
    """β, which says with `rank_semantics` the ranks of the compressed layers."""
    rank_semantics: Literal["removed", "kept"]
    harmonizer: HarmonizerForm
    like: Annotated[dict[int, int], Field(max_length=1024, default_factory=dict)]
    """Whose weights each shared layer has."""
    cuts: Annotated[dict[int, Cut], Field(max_length=1024, default_factory=dict)]
    """How far layers are cut that β doesn't cut."""


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
    expected = tensor_shapes(meta_emulator(config, plan, buffers_too=True), plan)
    files = {part: TensorWriter(folder / f"{part}.safetensors", those) for part, those in expected.items()}
    for name, tensor in tensors:
        part = part_of(name, path, plan)
        if part not in files:
            raise ValueError(f"tensor {name!r} is of a {part} layer, of which a package has none")
        files[part].write(name, tensor)
    for file in files.values():
        file.check_whole()
    save_tokenizer(folder, tokenizer)
    known = _config_fields(config.model_type)
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
    write_manifest(folder, manifest)


def read_manifest(folder: Path) -> PackageManifest:
    """The manifest of a package, after every file that it lists was found whole; UserError otherwise."""
    return read_checked(folder, PackageManifest, FILES)


def plan_of(manifest: PackageManifest) -> Plan:
    """The layer plan that a manifest states; ValueError for one that makes no sense."""
    if "adapter" not in manifest.layers:
        raise ValueError("no layer is an adapter layer")
    form, beta = manifest.harmonizer, manifest.beta
    return Plan(manifest.layers, beta, manifest.rank_semantics, form, manifest.like, manifest.cuts)


def _config_fields(model_type: str) -> set[str]:
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
    foreign = sorted(fields.keys() - _config_fields(name))
    if foreign:
        raise ValueError(f"`{foreign[0]}` is no setting of {name}")
    count = CONFIG_MAPPING[name].attribute_map.get("num_hidden_layers", "num_hidden_layers")
    stated = {fields.get(count), fields.get("num_hidden_layers", fields.get(count))}
    if stated != {len(manifest.layers)}:  # before a configuration of so many layers is made
        raise ValueError(f"`layers` has {len(manifest.layers)} kinds, the architecture {fields.get(count)!r}")
    return AutoConfig.for_model(name, **{**fields, "dtype": DTYPES[manifest.dtype]})


def outline(folder: Path) -> tuple[PackageManifest, PreTrainedModel, dict[Path, Shapes]]:
    """A package's manifest, its model without weights, and the tensors that each of its files must have.

    UserError where the manifest describes no model. Of the files nothing but hashes was read.
    """
    manifest = read_manifest(folder)
    try:
        plan = plan_of(manifest)
        model = meta_emulator(_config(manifest), plan, buffers_too=True)
        buffers = sum(buffer.numel() for buffer in model.buffers())
        if buffers > LARGEST_BUFFERS:
            raise ValueError(f"its buffers would have {buffers:,} numbers")
    except Exception as error:  # whatever a manifest that makes no sense leads to
        raise UserError(f"{folder}/{MANIFEST}: it describes no model ({one_line(error)}); fetch it again") from error
    expected: dict[Path, Shapes] = {folder / name: {} for name in manifest.files if name.endswith(".safetensors")}
    expected |= {folder / f"{part}.safetensors": tensors for part, tensors in tensor_shapes(model, plan).items()}
    return manifest, model, expected


def load(folder: Path, *, device: torch.device) -> tuple[PreTrainedModel, Plan]:
    """Read a package as a model, frozen, and its plan.

    The model is built from the manifest's configuration with no weights, its layers are replaced as the plan says,
    and every tensor must then be in the files, by name, shape and dtype, and nothing else.
    """
    manifest, _, expected = outline(folder)
    plan = plan_of(manifest)
    tensors = untrusted.read_untrusted_tensors(expected)
    model = assemble(_config(manifest), plan, tensors.items(), device=device)
    try:
        with torch.no_grad():
            last_hidden_state(model, torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # whatever settings that don't go together lead to
        raise UserError(f"{folder}/{MANIFEST}: its model doesn't run ({one_line(error)}); fetch it again") from error
    return model, plan
