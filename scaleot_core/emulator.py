"""The emulator package: which layer becomes what, how it is built, written, checked and read back (method section 3).

A package is a folder of safetensors, the tokenizer's files and one manifest.json. It holds everything that the data
owner needs, and it is all that the data owner needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import torch
from accelerate import init_empty_weights
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scaleot_core import handover
from scaleot_core.decomposition import Decompose, shapes
from scaleot_core.errors import UserError, one_line
from scaleot_core.families import FAMILIES, attention, decoder_layers, family
from scaleot_core.files import write_tensors
from scaleot_core.handover import MANIFEST, TOKENIZER_FILES, Shapes
from scaleot_core.harmonizer import Harmonizer, Harmonizers
from scaleot_core.models import check_layers
from scaleot_core.params import HarmonizerForm, Params, Share
from scaleot_core.rank_compression import compress_layer
from scaleot_core.runtime import DTYPES

FORMAT: Final = "scaleot-emulator"
FORMAT_VERSION: Final = 2
UNSTATED = "not stated: ask the model owner"
LARGEST_BUFFERS = 2**24  # numbers: those that a model computes for itself, as rotary frequencies

Kind = Literal["adapter", "harmonizer", "compressed"]
FILES = (*(f"{part}.safetensors" for part in ("base", *get_args(Kind))), *TOKENIZER_FILES)


@dataclass(frozen=True)
class Plan:
    """What becomes of every decoder layer, and how hard the compressed ones are cut."""

    kinds: tuple[Kind, ...]
    beta: float
    rank_semantics: Literal["removed", "kept"]
    harmonizer: HarmonizerForm

    def layers(self, kind: Kind) -> list[int]:
        """Indices of the layers of one kind, ascending."""
        return [i for i, k in enumerate(self.kinds) if k == kind]


class PackageManifest(handover.Manifest):
    """A package's manifest: what tuning needs to know, and no more."""

    format: Literal["scaleot-emulator"] = FORMAT
    format_version: Literal[2] = FORMAT_VERSION
    licence: Annotated[str, Field(max_length=1000)]
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


def choose_layers(scores: Sequence[float], *, adapter_layers: int, alpha: float, placement: str) -> tuple[Kind, ...]:
    """Every layer's kind from its score: N_a adapter layers, then a share α of the others as harmonizers.

    Placement "importance" takes the layers of highest score, "ends" the two bottom and two top ones of N_a = 4 (the
    bottom has the odd one). Harmonizers replace the other layers of lowest score; their number is rounded half up.
    UserError for more adapter layers than the model can give.
    """
    check_layers("adapter_layers", adapter_layers, len(scores), least=1, most=len(scores) - 1)
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if placement == "ends":
        bottom = math.ceil(adapter_layers / 2)
        adapters = {*range(bottom), *range(len(scores) - (adapter_layers - bottom), len(scores))}
    else:
        adapters = set(ranked[:adapter_layers])
    others = [i for i in ranked if i not in adapters]
    replaced = set(others[len(others) - math.floor(round(alpha * len(others), 9) + 0.5) :])
    return tuple(
        "adapter" if i in adapters else "harmonizer" if i in replaced else "compressed" for i in range(len(scores))
    )


def plan(params: Params, scores: Sequence[float]) -> Plan:
    """What the parameters make of a model's layers, by their scores."""
    kinds = choose_layers(
        scores, adapter_layers=params.adapter_layers, alpha=params.alpha, placement=params.adapter_placement
    )
    return Plan(kinds, params.beta, params.rank_semantics, params.harmonizer)


def _stand_in(model: PreTrainedModel, plan: Plan, decompose: Decompose) -> None:
    """Give a model's layers the modules that the plan asks for, in place.

    Attention layers are numbered anew, since a key-value cache counts the layers that use it.
    """
    layers = decoder_layers(model)
    size = model.config.hidden_size
    numbered = 0
    for i, kind in enumerate(plan.kinds):
        if kind == "harmonizer":
            like = next(layers[i].parameters())
            layers[i] = Harmonizer(size, plan.harmonizer).to(device=like.device, dtype=like.dtype)
            continue
        attention(model.config, layers[i]).layer_idx = numbered  # type: ignore[assignment]
        numbered += 1
        if kind == "compressed":
            compress_layer(model, i, beta=plan.beta, semantics=plan.rank_semantics, decompose=decompose)


def build(model: PreTrainedModel, harmonizers: Harmonizers, plan: Plan, decompose: Decompose) -> None:
    """Turn the model into the emulator, in place: [A, E*]."""
    _stand_in(model, plan, decompose)
    layers = decoder_layers(model)
    for i in plan.layers("harmonizer"):
        layers[i].load_state_dict(harmonizers[i].state_dict())
    model.requires_grad_(False)


def _untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors without second names for the same storage, as a tied head has."""
    state = model.state_dict()
    seen: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in state.items()
        if tensor.is_meta or seen.setdefault(tensor.data_ptr(), name) == name or tensor.numel() == 0
    }


def _part(name: str, layers_path: str, plan: Plan) -> str:
    """The file that a tensor belongs in: by the kind of its layer, or `base` for embeddings, norm and head."""
    if not name.startswith(f"{layers_path}."):
        return "base"
    return plan.kinds[int(name.removeprefix(f"{layers_path}.").split(".")[0])]


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, licence: str = UNSTATED
) -> None:
    """Write an emulator as a package into an existing, empty folder."""
    path = family(model.config).layers
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _untied(model).items():
        parts.setdefault(_part(name, path, plan), {})[name] = tensor
    for part, tensors in parts.items():
        write_tensors(folder / f"{part}.safetensors", tensors)
    tokenizer.save_pretrained(folder)
    known = _settings(model.config.model_type)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "licence": licence,
        "architecture": {key: value for key, value in model.config.to_dict().items() if key in known},
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": list(plan.kinds),
        "beta": plan.beta,
        "rank_semantics": plan.rank_semantics,
        "harmonizer": plan.harmonizer.model_dump(),
    }
    handover.write(folder, manifest)


def read_manifest(folder: Path) -> PackageManifest:
    """The manifest of a package, after every file that it lists was found whole; UserError otherwise."""
    return handover.read(folder, PackageManifest, FILES)


def plan_of(manifest: PackageManifest) -> Plan:
    """The layer plan that a manifest states."""
    return Plan(manifest.layers, manifest.beta, manifest.rank_semantics, manifest.harmonizer)


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
    config = AutoConfig.for_model(name, **fields)
    if config.num_hidden_layers != len(manifest.layers):
        raise ValueError(f"`layers` has {len(manifest.layers)} kinds, the architecture {config.num_hidden_layers}")
    return config


def _empty(manifest: PackageManifest, *, buffers_too: bool) -> PreTrainedModel:
    """The package's model without weights; buffers are computed, unless they too are to take no memory."""
    with init_empty_weights(include_buffers=buffers_too):
        model = AutoModelForCausalLM.from_config(_config(manifest), dtype=DTYPES[manifest.dtype])
        _stand_in(model, plan_of(manifest), shapes)
    return model


def outline(folder: Path) -> tuple[PackageManifest, PreTrainedModel, dict[Path, Shapes]]:
    """A package's manifest, its model without weights, and the tensors that each of its files must have.

    UserError where the manifest describes no model. Of the files nothing but hashes was read.
    """
    manifest = read_manifest(folder)
    plan = plan_of(manifest)
    try:
        model = _empty(manifest, buffers_too=True)
        buffers = sum(buffer.numel() for buffer in model.buffers())
        if buffers > LARGEST_BUFFERS:
            raise ValueError(f"its buffers would have {buffers:,} numbers")
    except Exception as error:  # whatever a manifest that makes no sense leads to
        raise UserError(f"{folder}/{MANIFEST}: it describes no model ({one_line(error)}); fetch it again") from error
    path, tied = family(model.config).layers, set(model.all_tied_weights_keys)
    expected: dict[Path, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
        folder / name: {} for name in manifest.files if name.endswith(".safetensors")
    }
    for name, tensor in model.state_dict().items():
        if name not in tied:
            file = folder / f"{_part(name, path, plan)}.safetensors"
            expected.setdefault(file, {})[name] = (tuple(tensor.shape), tensor.dtype)
    return manifest, model, dict(expected)


def load(folder: Path, *, device: torch.device) -> tuple[PreTrainedModel, Plan]:
    """Read a package as a model, frozen, and its plan.

    The model is built from the manifest's configuration with no weights, its layers are replaced as the plan says,
    and every tensor must then be in the files, by name, shape and dtype, and nothing else.
    """
    manifest, _, expected = outline(folder)
    tensors = handover.read_tensors(expected)
    model = _empty(manifest, buffers_too=False)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), plan_of(manifest)


def layer_parameters(model: PreTrainedModel, plan: Plan, kind: Kind) -> dict[str, nn.Parameter]:
    """The parameters of the layers of one kind, by their names in the model. Offsite tuning trains the adapters'."""
    path = family(model.config).layers
    return {name: p for name, p in model.named_parameters() if _part(name, path, plan) == kind}


def plug_in(model: PreTrainedModel, plan: Plan, tensors: dict[str, Tensor], kind: Kind = "adapter") -> None:
    """Put tuned tensors into the layers of one kind: adapters into the emulator or the real model, in place.

    They must be all that the plan's layers of that kind have and nothing else; UserError names one that isn't.
    """
    parameters = layer_parameters(model, plan, kind)
    for name in sorted(parameters.keys() | tensors.keys()):
        here, given = parameters.get(name), tensors.get(name)
        if here is None or given is None or here.shape != given.shape:
            raise UserError(
                f"{kind} tensor {name!r} is missing, foreign or of another shape; tune the adapter on this package"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
