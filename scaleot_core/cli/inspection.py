"""Either party's command: `inspect`."""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_core.cli.options import AsJson
from scaleot_core.cli.output import describe_adapters, show

if TYPE_CHECKING:
    from scaleot_core.exchange.adapter_folder import AdapterManifest
    from scaleot_core.exchange.description import PackageManifest
    from scaleot_core.exchange.manifest import Manifest
    from scaleot_core.exchange.package import Package


def inspect(
    path: Annotated[Path, typer.Argument(help="A package or an adapter: a folder or .zip.")],
    verify: Annotated[
        Path | None, typer.Option(help="The public key (PEM) of who is to have signed it (extra `signing`).")
    ] = None,
    render: Annotated[
        bool, typer.Option("--render", help="Run the package's chat template, to see which parts of a chat it renders.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Either party: what a package or an adapter is, whether it came whole, and what in it is suspicious.

    A package is checked to the last shape; an adapter by `scaleot check`, which knows the package it belongs to.
    """
    from scaleot_core.exchange import adapter_folder
    from scaleot_core.exchange.archive import unpacked
    from scaleot_core.exchange.manifest import manifest_format, manifest_sha256
    from scaleot_core.exchange.package import Package

    with unpacked(path) as folder:
        manifest: Manifest
        if manifest_format(folder) == adapter_folder.FORMAT:
            manifest = adapter_manifest = adapter_folder.read_manifest(folder)
            signature = _signature(folder, verify)
            properties = _adapter_properties(adapter_manifest)
        else:
            package = Package(folder)
            signature = _signature(folder, verify)
            manifest, properties = package.manifest, _package_properties(package, render=render)
        summary = {
            "path": str(path),
            "format": f"{manifest.format} {manifest.format_version}",
            **properties,
            "id": manifest_sha256(folder),
            "signature": signature,
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
        }
        files = {name: entry.model_dump() for name, entry in manifest.files.items()}
    show({**summary, "files": files} if as_json else summary, as_json)


def _signature(folder: Path, key: Path | None) -> str | None:
    """Say whose signature is in a folder, as far as that is known; UserError where it isn't that of a key's owner."""
    from scaleot_core.exchange.manifest import SIGNATURE
    from scaleot_core.exchange.signature import verify_signature

    if key:
        verify_signature(folder, key)
        return f"by the owner of {key}"
    return "not verified; name its public key with --verify" if (folder / SIGNATURE).is_file() else None


def _adapter_properties(manifest: "AdapterManifest") -> dict[str, Any]:
    """List what an adapter says of itself."""
    return {
        "tuned on package": manifest.package,
        "layers": list(manifest.layers),
        "whole": True,
        "adapters": describe_adapters(manifest.lora),
        **{f"tuning: {key}": value for key, value in manifest.tuning.model_dump(exclude_none=True).items()},
    }


def _probed(package: "Package", sentences: list[list[int]]) -> list[str] | None:
    """Check a package to the last number, and list what is suspicious in it; None where it is too large to be run."""
    import torch

    from scaleot_core.common.progress import say
    from scaleot_core.exchange.suspicions import suspicions
    from scaleot_core.memory import device_memory, tuning_bytes

    cpu = torch.device("cpu")
    if tuning_bytes(package, whole_layers=False) > device_memory(cpu) / 2:
        package.check()
        say("too large to be run here: whether it is a trap for records wasn't looked at", style="yellow")
        return None
    return suspicions(package.load(cpu), package.plan, sentences, secrets.randbits(63))


def _package_properties(package: "Package", *, render: bool) -> dict[str, Any]:
    """List what a sound package is, what records it takes, and what in it looks like a trap for them."""
    from scaleot_core.exchange.foreign_tokenizer import template_parts, try_tokenizer
    from scaleot_core.models.families import context_length

    manifest, model, tried = package.manifest, package.meta_model, try_tokenizer(package)
    suspicious = _probed(package, tried.sentences)
    return {
        "license": manifest.license,
        "architecture": model.config.model_type,
        "parameters": model.num_parameters(),
        "context in tokens": context_length(model.config),
        "chat template": tried.has_template,
        **({"chat template renders": template_parts(package)} if render else {}),
        "dtype": manifest.dtype,
        **({"quantized": manifest.quantized} if manifest.quantized else {}),
        "layers": [layer.model_dump(mode="json") for layer in manifest.layers],
        "sound": True,
        "suspicious": dict(enumerate(suspicious or (), start=1)),
        **_measured_recovery(manifest),
    }


def _measured_recovery(manifest: "PackageManifest") -> dict[str, Any]:
    """Return the recovery that the model owner measured, if any: a line for each task and kind of adapters."""
    lines = {
        f"{task}, {kind}": recovery for task, kinds in manifest.figures.items() for kind, recovery in kinds.items()
    }
    return {"recovery, as its owner measured it": lines} if lines else {}
