"""The emulator package: which layer becomes what, how it is built, written, checked and read back (method section 3).

A package is a folder of safetensors, the tokenizer's files and one manifest.json. It holds everything that the data
owner needs, and it is all that the data owner needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.decomposition import Decompose, shapes
from scaleot_core.errors import UserError, one_line
from scaleot_core.families import attention, decoder_layers, family
from scaleot_core.files import read_json, read_tensors, sha256, write_json, write_tensors
from scaleot_core.harmonizer import Harmonizer, Harmonizers
from scaleot_core.models import check_layers
from scaleot_core.params import HarmonizerForm
from scaleot_core.rank_compression import compress_layer
from scaleot_core.runtime import DTYPES

FORMAT = "scaleot-emulator"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Kind = Literal["adapter", "harmonizer", "compressed"]


@dataclass(frozen=True)
class Plan:
    """What becomes of every decoder layer, and how hard the compressed ones are cut."""

    kinds: tuple[Kind, ...]
    beta: float
    rank_semantics: str
    harmonizer: HarmonizerForm

    def layers(self, kind: Kind) -> list[int]:
        """Indices of the layers of one kind, ascending."""
        return [i for i, k in enumerate(self.kinds) if k == kind]


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


def _stand_in(model: PreTrainedModel, plan: Plan, decompose: Decompose) -> dict[str, dict[str, list[int]]]:
    """Give a model's layers the modules that the plan asks for, in place; return the ranks of the compressed ones.

    Attention layers are numbered anew, since a key-value cache counts the layers that use it.
    """
    layers = decoder_layers(model)
    ranks = {}
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
            ranks[str(i)] = compress_layer(model, i, beta=plan.beta, semantics=plan.rank_semantics, decompose=decompose)
    return ranks


def build(
    model: PreTrainedModel, harmonizers: Harmonizers, plan: Plan, decompose: Decompose
) -> dict[str, dict[str, list[int]]]:
    """Turn the model into the emulator, in place: [A, E*]. Returns the ranks of the compressed layers' projections."""
    ranks = _stand_in(model, plan, decompose)
    layers = decoder_layers(model)
    for i in plan.layers("harmonizer"):
        layers[i].load_state_dict(harmonizers[i].state_dict())
    model.requires_grad_(False)
    return ranks


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
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, ranks: dict[str, Any]
) -> None:
    """Write an emulator as a package into an existing, empty folder."""
    path = family(model.config).layers
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _untied(model).items():
        parts.setdefault(_part(name, path, plan), {})[name] = tensor
    for part, tensors in parts.items():
        write_tensors(folder / f"{part}.safetensors", tensors)
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model_config": config,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": list(plan.kinds),
            "beta": plan.beta,
            "rank_semantics": plan.rank_semantics,
            "harmonizer": plan.harmonizer.model_dump(),
            "ranks": ranks,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())
            },
        },
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a package, after every file that it lists was found whole; UserError otherwise."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: not an emulator package ({MANIFEST} names another format)")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder}: package version {manifest.get('format_version')!r}; this reads {FORMAT_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder}/{MANIFEST}: `files` is missing")
    for name, entry in files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise UserError(f"{folder}: {name!r} is not a file of the package; fetch it again")
        if entry != {"bytes": file.stat().st_size, "sha256": sha256(file)}:
            raise UserError(f"{file}: the content is not what the manifest says; fetch it again")
    unlisted = {file.name for file in folder.iterdir()} - {*files, MANIFEST}
    if unlisted:
        raise UserError(f"{folder}: {min(unlisted)!r} is not among the files of the package; fetch it again")
    return manifest


def plan_of(manifest: dict[str, Any]) -> Plan:
    """The layer plan that a manifest states."""
    return Plan(
        kinds=tuple(manifest["layers"]),
        beta=manifest["beta"],
        rank_semantics=manifest["rank_semantics"],
        harmonizer=HarmonizerForm.model_validate(manifest["harmonizer"]),
    )


def load(folder: Path, *, device: torch.device) -> tuple[PreTrainedModel, Plan]:
    """Read a package as a model, frozen, and its plan.

    The model is built from the manifest's configuration with no weights, its layers are replaced as the plan says,
    and every tensor must then be in the files, by name and shape, and nothing else.
    """
    manifest = read_manifest(folder)
    try:
        plan = plan_of(manifest)
        fields = dict(manifest["model_config"])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        family(config)
        if len(plan.kinds) != config.num_hidden_layers or not set(plan.kinds) <= set(get_args(Kind)):
            raise ValueError("`layers` doesn't name one known kind for each layer")
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[manifest["dtype"]])
            _stand_in(model, plan, shapes)
    except UserError:
        raise
    except Exception as error:  # whatever a manifest that makes no sense leads to
        raise UserError(f"{folder}/{MANIFEST}: it describes no model ({one_line(error)}); fetch it again") from error
    tensors: dict[str, Tensor] = {}
    for part in ("base", "adapter", "harmonizer", "compressed"):
        if f"{part}.safetensors" in manifest["files"]:
            tensors.update(read_tensors(folder / f"{part}.safetensors"))
    expected, given = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        for state in (model.state_dict(), tensors)
    )
    tied = set(model.all_tied_weights_keys)
    wrong = {name for name in expected.keys() ^ given.keys() if name not in tied}
    wrong |= {name for name in expected.keys() & given.keys() if expected[name] != given[name]}
    if wrong:
        raise UserError(
            f"{folder}: tensor {min(wrong)!r} is missing, foreign or of the wrong shape or dtype; fetch it again"
        )
    try:
        model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: {one_line(error)}") from None
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
