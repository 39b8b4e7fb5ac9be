"""The emulator package: which layer becomes what, how it is built, written, checked and read back (method section 3).

A package is a folder of safetensors, the tokenizer's files and one manifest.json. It holds everything that the data
owner needs, and it is all that the data owner needs.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from accelerate import init_empty_weights
from pydantic import BaseModel, ConfigDict, Field
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
from scaleot_core.params import HarmonizerForm, Params, Positive, Share
from scaleot_core.rank_compression import compress_layer, keep_channels, kept_ranks
from scaleot_core.runtime import DTYPES

FORMAT: Final = "scaleot-emulator"
FORMAT_VERSION: Final = 2
DECIDED_BY = {
    "alpha",
    "beta",
    "method",
    "budget",
    "adapter_layers",
    "adapter_placement",
    "rank_semantics",
    "harmonizer",
    "seed",
}  # parameters that decide what the emulator is
UNSTATED = "not stated: ask the model owner"
LARGEST_BUFFERS = 2**24  # numbers: those that a model computes for itself, as rotary frequencies

Kind = Literal["adapter", "harmonizer", "compressed", "removed", "shared"]
PARTS = ("base", "adapter", "harmonizer", "compressed")  # a package's files of tensors
FILES = (*(f"{part}.safetensors" for part in PARTS), *TOKENIZER_FILES)


class Cut(BaseModel):
    """How far one compressed layer is cut, where β doesn't say it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranks: Annotated[dict[str, tuple[Positive, ...]], Field(max_length=4)]
    """Of the matrices in each attention projection, by its name in the attention."""
    channels: Positive
    """Of the feed-forward part."""


@dataclass(frozen=True)
class Plan:
    """What becomes of every decoder layer, and how hard the compressed ones are cut."""

    kinds: tuple[Kind, ...]
    beta: float
    rank_semantics: Literal["removed", "kept"]
    harmonizer: HarmonizerForm
    like: Mapping[int, int] = field(default_factory=dict)
    """Whose weights, as they are shipped, each shared layer has."""
    cuts: Mapping[int, Cut] = field(default_factory=dict)
    """Of compressed layers that aren't cut by β."""

    def __post_init__(self) -> None:
        """ValueError for a plan that makes no sense."""
        for what, found, kind in (("like", self.like, "shared"), ("cuts", self.cuts, "compressed")):
            for i in found:
                if not (0 <= i < len(self.kinds) and self.kinds[i] == kind):
                    raise ValueError(f"`{what}` has layer {i}, which is not {kind}")
        for i in self.layers("shared"):
            if self.like.get(i) not in (*self.layers("compressed"), *self.layers("adapter")):
                raise ValueError(f"layer {i} is shared with no layer that is there")

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
    like: Annotated[dict[int, int], Field(max_length=1024, default_factory=dict)]
    """Whose weights each shared layer has."""
    cuts: Annotated[dict[int, Cut], Field(max_length=1024, default_factory=dict)]
    """How far layers are cut that β doesn't cut."""


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


def _stand_in(
    model: PreTrainedModel, plan: Plan, decompose: Decompose, channels: Mapping[int, Tensor] | None = None
) -> None:
    """Give a model's layers the modules that the plan asks for, in place.

    `channels` are the feed-forward channels that a layer keeps, where it is cut there. Attention layers are numbered
    anew, since a key-value cache counts the layers that use it.
    """
    layers, channels = decoder_layers(model), channels or {}
    size = model.config.hidden_size
    numbered = 0
    for i, kind in enumerate(plan.kinds):
        if kind == "harmonizer":
            like = next(layers[i].parameters())
            layers[i] = Harmonizer(size, plan.harmonizer).to(device=like.device, dtype=like.dtype)
        elif kind == "removed":
            layers[i] = Removed()
        elif kind == "compressed":
            cut = plan.cuts.get(i)
            ranks = cut.ranks if cut else kept_ranks(model, i, beta=plan.beta, semantics=plan.rank_semantics)
            compress_layer(model, i, ranks=ranks, decompose=decompose)
            if cut:
                keep_channels(model, i, channels.get(i, torch.arange(cut.channels)))
    for i, other in plan.like.items():
        layers[i] = copy.deepcopy(layers[other])
    for i, kind in enumerate(plan.kinds):
        if kind in ("adapter", "compressed", "shared"):
            attention(model.config, layers[i]).layer_idx = numbered  # type: ignore[assignment]
            numbered += 1


class Removed(nn.Module):
    """Where a layer was: hidden states (B, T, D) go through as they are."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return hidden_states


def build(
    model: PreTrainedModel,
    plan: Plan,
    decompose: Decompose,
    *,
    harmonizers: Harmonizers | None = None,
    channels: Mapping[int, Tensor] | None = None,
) -> None:
    """Turn the model into the emulator, in place: [A, E*]."""
    _stand_in(model, plan, decompose, channels)
    layers = decoder_layers(model)
    for i in plan.layers("harmonizer"):
        assert harmonizers is not None
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
        if (part := _part(name, path, plan)) in PARTS:
            parts.setdefault(part, {})[name] = tensor
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
        "like": {str(i): other for i, other in plan.like.items()},
        "cuts": {str(i): cut.model_dump(mode="json") for i, cut in plan.cuts.items()},
    }
    handover.write(folder, manifest)


def read_manifest(folder: Path) -> PackageManifest:
    """The manifest of a package, after every file that it lists was found whole; UserError otherwise."""
    return handover.read(folder, PackageManifest, FILES)


def plan_of(manifest: PackageManifest) -> Plan:
    """The layer plan that a manifest states."""
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
    config = AutoConfig.for_model(name, **fields)
    if config.num_hidden_layers != len(manifest.layers):
        raise ValueError(f"`layers` has {len(manifest.layers)} kinds, the architecture {config.num_hidden_layers}")
    return config


def _tensors(model: PreTrainedModel, plan: Plan) -> dict[str, Shapes]:
    """What each file of a package has of an emulator without weights: names, shapes and dtypes of its tensors."""
    path, tied = family(model.config).layers, set(model.all_tied_weights_keys)
    found: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied and (part := _part(name, path, plan)) in PARTS:
            found.setdefault(part, {})[name] = (tuple(tensor.shape), tensor.dtype)
    return dict(found)


def plan_bytes(config: PretrainedConfig, plan: Plan) -> int:
    """Bytes of the tensors that a package of a model with this plan has."""
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        _stand_in(model, plan, shapes)
    parts = _tensors(model, plan).values()
    return sum(math.prod(shape) * dtype.itemsize for part in parts for shape, dtype in part.values())


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
    try:
        plan = plan_of(manifest)
        model = _empty(manifest, buffers_too=True)
        buffers = sum(buffer.numel() for buffer in model.buffers())
        if buffers > LARGEST_BUFFERS:
            raise ValueError(f"its buffers would have {buffers:,} numbers")
    except Exception as error:  # whatever a manifest that makes no sense leads to
        raise UserError(f"{folder}/{MANIFEST}: it describes no model ({one_line(error)}); fetch it again") from error
    expected: dict[Path, Shapes] = {folder / name: {} for name in manifest.files if name.endswith(".safetensors")}
    expected |= {folder / f"{part}.safetensors": tensors for part, tensors in _tensors(model, plan).items()}
    return manifest, model, expected


def load(folder: Path, *, device: torch.device) -> tuple[PreTrainedModel, Plan]:
    """Read a package as a model, frozen, and its plan.

    The model is built from the manifest's configuration with no weights, its layers are replaced as the plan says,
    and every tensor must then be in the files, by name, shape and dtype, and nothing else.
    """
    manifest, _, expected = outline(folder)
    tensors = handover.read_tensors(expected)
    model, plan = _empty(manifest, buffers_too=False), plan_of(manifest)
    path = family(model.config).layers
    for i, other in plan.like.items():
        own = f"{path}.{other}."
        copies = {name: t.clone() for name, t in tensors.items() if name.startswith(own)}  # an adapter's will move
        tensors |= {name.replace(own, f"{path}.{i}.", 1): t for name, t in copies.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), plan


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
