"""Write model cards: of a package, from its manifest alone, and of what an adapter was plugged into."""

import re
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCardData

from scaleot_core.exchange.description import PackageManifest
from scaleot_core.exchange.manifest import CARD

PACKAGE = """\
# Emulator of a {family} model, for offsite tuning

The model behind it stays with its owner. This is what was cut from it, to tune adapters in: on its own it answers worse
than the model does, and an adapter shows what it has learnt in the model alone.

- License: {license}
- Family: {family}
- What was cut: of {count} decoder layers {kinds}{quantized}

To tune an adapter on records of yours, which stay with you, and to see what else this package is:

    pip install scaleot
    scaleot inspect PACKAGE
    scaleot tune PACKAGE --data records.jsonl --out adapter.zip

`adapter.zip` is all that goes back to the model's owner.
"""
PLUGGED = """\
# {base}, tuned offsite

{what} of {base}, tuned by scaleot in the package {package} without its weights and plugged into it.
"""


def write_package_card(folder: Path, manifest: PackageManifest) -> None:
    """Write the model card of a package beside its files."""
    family, license = str(manifest.architecture["model_type"]), manifest.license
    data = ModelCardData(
        library_name="scaleot",
        license=license.lower() if re.fullmatch(r"[A-Za-z0-9.-]+", license) else "other",
        tags=["offsite-tuning", family],
    )
    kinds = Counter(layer.kind for layer in manifest.layers)
    text = PACKAGE.format(
        family=family,
        license=" ".join(license.split()),
        count=len(manifest.layers),
        kinds=", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        quantized=f"; matrices are in {manifest.quantized}" if manifest.quantized else "",
    )
    _write(folder, data, text)


def write_plugged_card(folder: Path, base: str, package: str, what: str, *, library: str) -> None:
    """Write the model card of a plug-in model, or of its LoRA; of a local model's path the name alone is told."""
    path = Path(base).expanduser()
    base = path.resolve().name if path.exists() else base
    data = ModelCardData(base_model=base, library_name=library, tags=["offsite-tuning"])
    _write(folder, data, PLUGGED.format(base=base, what=f"{what[:1].upper()}{what[1:]}", package=package))


def _write(folder: Path, data: ModelCardData, text: str) -> None:
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
