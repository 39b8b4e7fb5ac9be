"""What a package says of itself: its manifest, and the model's configuration in it."""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_json
from scaleot_core.common.runtime import DTYPES
from scaleot_core.compression.plan import Layer
from scaleot_core.exchange.manifest import MOST_LAYERS, Manifest
from scaleot_core.models.families import FAMILIES, TRAINED_LENGTH
from scaleot_core.settings import AdapterKind

FORMAT: Final = "scaleot-emulator"
FORMAT_VERSION: Final = 4
UNSTATED = "not stated: ask the model owner"
LONGEST_LICENSE = 1000  # characters

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Recovery = Annotated[dict[Label, float | None], Field(max_length=16)]


class PackageManifest(Manifest):
    """A package's manifest: what tuning needs to know, and no more."""

    format: Literal["scaleot-emulator"] = FORMAT
    format_version: Literal[4] = FORMAT_VERSION
    license: Annotated[str, Field(max_length=LONGEST_LICENSE)]
    """Under which the package is shipped."""
    architecture: dict[str, Any]
    """The model's configuration, as transformers has it."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of every tensor, except on disk those that are `quantized`."""
    quantized: Annotated[Literal["int8"] | None, Field(exclude_if=lambda form: form is None)] = None
    """What the matrices of harmonizers and compressed layers are stored as, if not in `dtype`."""
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MOST_LAYERS)]
    """The plan: what became of each decoder layer."""
    figures: Annotated[dict[Label, dict[AdapterKind, Recovery]], Field(max_length=64, default_factory=dict)]
    """The model owner's own measured recovery, by task, adapters and metric, if it chose to tell."""


def measured_recovery(metrics: Path, package: str) -> dict[str, Any]:
    """Read the recovery from a metrics.json, by task, adapters and metric; UserError where it is another package's."""
    measured = read_json(metrics)
    try:
        if measured["emulator"]["package"] != package:
            raise UserError(f"{metrics}: it was measured with another package than the one to ship; run `dvc repro`")
        return {
            task: {kind: figures["recovery"] for kind, figures in of_task["adapters"].items()}
            for task, of_task in measured["tasks"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{metrics}: it is no metrics.json of this version; run `dvc repro`") from None


def config_fields(model_type: str) -> set[str]:
    """Name the settings that a configuration may have: those of transformers' class, except where it came from.

    Where the class states no context, the number of tokens that the model was trained on too.
    """
    config = AutoConfig.for_model(model_type)
    trained = set() if hasattr(config, "max_position_embeddings") else {TRAINED_LENGTH}
    return set(config.to_dict()) - {"_name_or_path"} | trained


def stated_config(manifest: PackageManifest) -> PretrainedConfig:
    """Build the configuration that a manifest states: plain settings of a supported architecture and no others.

    ValueError for any other setting, such as `auto_map`, `attn_implementation` or `quantization_config`, with which
    transformers would fetch or run something.
    """
    fields = dict(manifest.architecture)
    name = fields.pop("model_type", None)
    if name not in FAMILIES:
        raise ValueError(f"architecture {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    foreign = sorted(fields.keys() - config_fields(name))
    if foreign:
        raise ValueError(f"`{foreign[0]}` is no setting of {name}")
    trained = fields.get(TRAINED_LENGTH)
    if trained is not None and (type(trained) is not int or trained < 1):
        raise ValueError(f"`{TRAINED_LENGTH}` is {trained!r}; it should be a number of tokens")
    count = CONFIG_MAPPING[name].attribute_map.get("num_hidden_layers", "num_hidden_layers")
    stated = {fields.get(count), fields.get("num_hidden_layers", fields.get(count))}
    if stated != {len(manifest.layers)}:  # before a configuration of so many layers is made
        raise ValueError(f"`layers` has {len(manifest.layers)} entries, the architecture {fields.get(count)!r}")
    return AutoConfig.for_model(name, **{**fields, "dtype": DTYPES[manifest.dtype]})
