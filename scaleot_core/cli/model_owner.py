"""The model owner's commands: `pack`, `check` and `plug`."""

import secrets
from contextlib import ExitStack
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaleot_core.cli.options import AdapterArgument, AsJson, PackageOption, SignOption, setting
from scaleot_core.cli.output import describe_adapters, private_file, show, show_changes
from scaleot_core.common.errors import UserError
from scaleot_core.settings import AdapterLimits

if TYPE_CHECKING:
    from scaleot_core.exchange.ledger import ExactWeights

LIMITS = AdapterLimits()


def pack(
    out: Annotated[Path, typer.Option(help="The package to write: a folder, or one file if the name ends in .zip.")],
    license: Annotated[
        str | None, typer.Option(help="Under which the package is shipped; without it the receiver is told to ask you.")
    ] = None,
    project: Annotated[Path, typer.Option(help="The folder in which the pipeline was run.")] = Path("."),
    figures: Annotated[
        Path | None,
        typer.Option(help="metrics.json: tell the data owner the recovery that you measured with this package."),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option(
            help="int8: ship the matrices of compressed layers and harmonizers as whole numbers with one scale a row. "
            "Without it all is shipped as the pipeline wrote it."
        ),
    ] = None,
    recipient: Annotated[
        str | None, typer.Option(help="For whom it is: a mark that `scaleot trace` finds in what was made from it.")
    ] = None,
    max_union: Annotated[
        float,
        typer.Option(min=0, max=1, help="Refuse where all packages of the model together have more of it exactly."),
    ] = 0.8,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="OUT.private.json of a package that was made of the model elsewhere; may be given again."),
    ] = None,
    sign: SignOption = None,
    as_json: AsJson = False,
) -> None:
    """Model owner: make the package to ship from what the pipeline wrote.

    Beside it comes OUT.private.json, with the layers' scores, the parameters, which feed-forward channels are in the
    package, and what metrics.json and attack.json have of it. It stays with you: `plug` needs it for LoRA on
    pruned matrices. So does ledger.private.json in the project, of which packages have what of the model exactly.
    """
    from scaleot_core.artifacts import Artifacts
    from scaleot_core.common.files import read_json, write_json
    from scaleot_core.compression.emulator import PARTS
    from scaleot_core.exchange.archive import new_output
    from scaleot_core.exchange.description import LONGEST_LICENSE, UNSTATED, measured_recovery
    from scaleot_core.exchange.ledger import LEDGER, enter, read_exact
    from scaleot_core.exchange.manifest import copy_files, manifest_sha256
    from scaleot_core.exchange.model_card import write_package_card
    from scaleot_core.exchange.package import Package, save
    from scaleot_core.exchange.signature import load_signer
    from scaleot_core.exchange.watermark import marked, recipient_key
    from scaleot_core.params import load_params
    from scaleot_core.pipeline import DVC_YAML, read_entry

    signer = load_signer(sign) if sign else None
    license = UNSTATED if license is None else license
    if len(license) > LONGEST_LICENSE:
        raise UserError(f"--license: {len(license)} characters are too many; {LONGEST_LICENSE} are the most")
    artifacts = Artifacts(project / "artifacts")
    private = read_json(artifacts.emulator_private)
    params = load_params(project / "params.yaml")
    if private["params"] != read_entry("compress", file=project / DVC_YAML).values(params):
        raise UserError(
            f"{artifacts.emulator}: it was made with other parameters than params.yaml has now; run `dvc repro` first"
        )
    package = Package(artifacts.emulator, links=True)
    recovery = {"figures": measured_recovery(figures, package.sha256)} if figures else {}
    exact, ledger = read_exact(artifacts.emulator_private)[package.sha256], project / LEDGER
    union = _check_union(exact, ledger, beside or [], max_union)
    mark: dict[str, Any] = {"recipient": recipient, "secret": secrets.token_hex(32), "unmarked": package.sha256}
    with new_output(out, private_file(out)) as folder:
        if quantize or recipient:
            config, plan, tensors = package.config, package.plan, package.stream(*PARTS)
            if recipient:
                mark["tensors"] = []
                tensors = marked(tensors, recipient_key(mark["secret"], recipient), exact, mark["tensors"])
            save(folder, config, package.tokenizer(), plan, tensors, license, quantized=quantize, **recovery)
        else:
            copy_files(artifacts.emulator, folder, package.manifest, license=license, **recovery)
        identity = manifest_sha256(folder)
        write_package_card(folder, Package(folder).manifest)
        if signer:
            signer(folder)
    measured = _measured(project, package.sha256)
    private |= {"package": identity, "measured": measured, **({"mark": mark} if recipient else {})}
    write_json(private_file(out), private, private=True)
    enter(ledger, package.sha256, exact)
    summary = {"package": str(out), "id": identity, "private": str(private_file(out))}
    show({**summary, "exact": exact.share, "exact, all packages": union.share}, as_json)


def _check_union(exact: "ExactWeights", ledger: Path, beside: list[Path], limit: float) -> "ExactWeights":
    """Return what a package and all that has left have of the model; UserError where the package takes it too far."""
    from scaleot_core.exchange.ledger import read_left

    lefts = [read_left(ledger, exact.model)] if ledger.exists() else []
    for file in beside:
        lefts.append(read_left(file, exact.model))
        if not lefts[-1]:
            raise UserError(f"{file}: its package is of another model; name those of this one alone with --beside")
    before = reduce(or_, filter(None, lefts), exact.model_copy(update={"tensors": {}}))
    union = before | exact
    if union.share > max(limit, before.share):
        raise UserError(
            f"with what has left before, {union.share:.1%} of the model's weights would be out exactly "
            f"({exact.share:.1%} in this package alone), the limit is {limit:.0%}; cut it from within "
            "what has left (`channels.within`), or raise --max-union"
        )
    return union


def _measured(project: Path, package: str) -> dict[str, Any]:
    """Read what a project has measured of a package, by file, so that a decision can be looked up later."""
    from scaleot_core.common.files import read_json

    files = {name: project / name for name in ("metrics.json", "attack.json")}
    measured = {name: read_json(file) for name, file in files.items() if file.is_file()}
    packages = {name: result.get("emulator", result).get("package") for name, result in measured.items()}
    return {name: result for name, result in measured.items() if packages[name] == package}


def check(adapter: AdapterArgument, package: PackageOption, as_json: AsJson = False) -> None:
    """Model owner: whether an adapter is sound and belongs to a package, and how far it moved each layer.

    Relative change is the norm of a layer's change over the norm of what was shipped, and the largest such ratio of its
    tensors; the outlier is the largest change of one weight over the root mean square of all changes in its tensor,
    about 5 for noise.
    """
    from scaleot_core.exchange.archive import unpacked
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.returned import check_adapter

    with unpacked(adapter) as folder, unpacked(package) as shipped:
        checked = check_adapter(folder, Package(shipped))
    summary = {"adapter": str(adapter), "sound": True, "adapters": describe_adapters(checked.form)}
    show_changes(summary, checked.layer_changes, as_json)


def plug(
    base: Annotated[str, typer.Argument(help="The real model: a transformers folder or a hub id.")],
    adapter: AdapterArgument,
    package: PackageOption,
    out: Annotated[Path | None, typer.Option(help="The plug-in model to write: a transformers folder.")] = None,
    as_lora: Annotated[
        Path | None, typer.Option(help="The PEFT adapter of the real model to write: a folder. Only of LoRA.")
    ] = None,
    private: Annotated[
        Path | None,
        typer.Option(help="What `scaleot pack` wrote for you beside the package; PACKAGE.private.json if not named."),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(help="Public text (.jsonl, .parquet, .csv with `text`, or .txt): the loss is compared on it."),
    ] = None,
    max_change: Annotated[float, setting(AdapterLimits, "max_change")] = LIMITS.max_change,
    max_tensor_change: Annotated[float, setting(AdapterLimits, "max_tensor_change")] = LIMITS.max_tensor_change,
    max_outlier: Annotated[float, setting(AdapterLimits, "max_outlier")] = LIMITS.max_outlier,
    max_loss_increase: Annotated[float, setting(AdapterLimits, "max_loss_increase")] = LIMITS.max_loss_increase,
    as_json: AsJson = False,
) -> None:
    """Model owner: check an adapter, plug it into the real model, and try it. OUT loads with transformers alone.

    With --as-lora the adapter is written for the real model, for whoever serves LoRA, and tried as PEFT loads it there.
    """
    from scaleot_core.common.files import atomic_folder
    from scaleot_core.common.progress import say
    from scaleot_core.exchange.adapter_folder import save_peft
    from scaleot_core.exchange.archive import check_new, unpacked
    from scaleot_core.exchange.manifest import CARD
    from scaleot_core.exchange.model_card import write_plugged_card
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.plugging import write_plugged
    from scaleot_core.exchange.returned import check_adapter, check_base, check_limits, fitted, tokenizer_change
    from scaleot_core.exchange.trial import trial_blocks, trial_lora, trial_loss
    from scaleot_core.models.opened import open_model
    from scaleot_core.tuning.adapters import TunedLora

    limits = AdapterLimits(max_change=max_change, max_tensor_change=max_tensor_change, max_outlier=max_outlier)
    if out is None and as_lora is None:
        raise UserError("nothing to write: name a folder with --out, or with --as-lora")
    outputs = [path for path in (out, as_lora) if path is not None]
    if out and as_lora:
        folders = [path.resolve() for path in outputs]
        if folders[0] == folders[1] or folders[0] in folders[1].parents or folders[1] in folders[0].parents:
            raise UserError("--out and --as-lora: one is the other, or lies in it; name two folders apart")
    for path in outputs:
        check_new(path)
    with ExitStack() as opened:
        folder, unpacked_package = (opened.enter_context(unpacked(path)) for path in (adapter, package))
        shipped = Package(unpacked_package)
        checked = check_adapter(folder, shipped)
        if as_lora and not isinstance(checked.adapter, TunedLora):
            raise UserError(f"{adapter}: it has whole layers, which are no LoRA; name --out alone")
        check_limits(adapter, checked.layer_changes, limits)
        source = opened.enter_context(open_model(base, scratch=outputs[0].parent))
        blocks = trial_blocks(public, source)
        model = source.streamed()
        check_base(base, model.read_stored, shipped)
        if change := tokenizer_change(source.tokenizer, shipped):
            say(
                f"{base}: its tokenizer isn't the package's, with which the adapter was tuned: {change}", style="yellow"
            )
        what = describe_adapters(checked.form)
        tuned = fitted(checked.adapter, shipped, model.model, private or private_file(package))
        before = trial_loss(source, source.files, blocks) if public else None
        losses = []
        if as_lora and isinstance(tuned, TunedLora):
            target = opened.enter_context(atomic_folder(as_lora))
            save_peft(target, source.config, tuned, layers=[change.layer for change in checked.layer_changes])
            write_plugged_card(target, base, shipped.sha256, what, library="peft")
            losses.append(trial_lora(source, target, tuned, blocks))
        if out:
            target = opened.enter_context(atomic_folder(out))
            write_plugged(target, source, model, tuned)
            if not (target / CARD).exists():  # the base's own
                write_plugged_card(target, base, shipped.sha256, what, library="transformers")
            losses.append(trial_loss(source, [target / file.name for file in source.files], blocks))
        if before is not None and not max(losses) <= before + max_loss_increase:
            raise UserError(
                f"{adapter}: with it the loss on {public} is {max(losses):.3f} nats instead of {before:.3f}; ask for "
                "another, or raise --max-loss-increase"
            )
    summary: dict[str, Any] = {"model": out and str(out), "lora": as_lora and str(as_lora)}
    if before is not None:
        summary |= {"loss on public text, real model": before, "loss on public text, plug-in": losses[-1]}
    show_changes(summary, checked.layer_changes, as_json)
