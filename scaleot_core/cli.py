"""The command line of the two parties: `scaleot pack`, `inspect`, `tune`, `check` and `plug`.

What a command needs is imported when it runs, so that `--help` is quick and the data owner needs no DVC.
"""

import json
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError, printable
from scaleot_core.common.progress import say

if TYPE_CHECKING:
    from scaleot_core.exchange.package import PackageManifest
    from scaleot_core.exchange.returned import LayerChange
    from scaleot_core.params import LoraForm, OffsiteTuning
    from scaleot_core.tuning.examples import Examples

PROGRESS_SECONDS = 60.0  # between two checkpoints of `tune`
OPTIONS = {  # by the parameter, where names differ
    "tasks": "--task",
    "data.questions": "--data",
    "data.corpus": "--public",
    "model": "BASE",
    "validation_fraction": "--validation",
    "rank": "--lora-rank",
    "alpha": "--lora-alpha",
    "modules": "--lora-modules",
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a language model that one party won't give away on data that another won't show. The model owner packs "
    "an emulator and ships it; the data owner tunes adapters in it and sends only them back; the model owner checks "
    "them and plugs them into the real model.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
PackageOption = Annotated[Path, typer.Option("--package", help="The package that was shipped: a folder or .zip.")]
AdapterArgument = Annotated[Path, typer.Argument(help="The adapter that came back: a folder or .zip.")]


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Model owner: make the package to ship from what the pipeline wrote.

    Beside it comes OUT.private.json, with the layers' scores, the parameters and which feed-forward channels are in the
    package, which stays with you: plugging in an adapter needs it.
    """
    from scaleot_core.artifacts import Artifacts
    from scaleot_core.common.files import read_json, write_json
    from scaleot_core.exchange.archive import new_output
    from scaleot_core.exchange.manifest import copy_files, manifest_sha256
    from scaleot_core.exchange.package import LONGEST_LICENSE, UNSTATED, Package, measured_recovery
    from scaleot_core.params import load_params
    from scaleot_core.pipeline import DVC_YAML, read_entry

    license = UNSTATED if license is None else license
    if len(license) > LONGEST_LICENSE:
        raise UserError(f"--license: {len(license)} characters are too many; {LONGEST_LICENSE} are the most")
    artifacts = Artifacts(project / "artifacts")
    known = read_json(artifacts.emulator_private)
    if known["params"] != read_entry("compress", file=project / DVC_YAML).values(load_params(project / "params.yaml")):
        raise UserError(
            f"{artifacts.emulator}: it was made with other parameters than params.yaml has now; run `dvc repro` first"
        )
    made = Package(artifacts.emulator, links=True)
    told = {"figures": measured_recovery(figures, made.sha256)} if figures else {}
    with new_output(out, _private(out)) as folder:
        copy_files(artifacts.emulator, folder, made.manifest, license=license, **told)
        identity = manifest_sha256(folder)
    write_json(_private(out), {**known, "package": identity}, private=True)
    _show({"package": str(out), "id": identity, "private": str(_private(out))}, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A package or an adapter: a folder or .zip.")],
    as_json: AsJson = False,
) -> None:
    """Either party: what a package or an adapter is, and whether it came whole. No weights are loaded.

    A package is checked to the last shape; an adapter by `scaleot check`, which knows the package it belongs to.
    """
    from scaleot_core.exchange import adapter
    from scaleot_core.exchange.archive import unpacked
    from scaleot_core.exchange.manifest import Manifest, manifest_format, manifest_sha256
    from scaleot_core.exchange.package import Package

    with unpacked(path) as folder:
        found: dict[str, Any] = {"path": str(path)}
        manifest: Manifest
        if manifest_format(folder) == adapter.FORMAT:
            manifest = given = adapter.read_manifest(folder)
            found |= {
                "format": f"{given.format} {given.format_version}",
                "tuned on package": given.package,
                "layers": list(given.layers),
                "whole": True,
                "adapters": _adapters(given.lora),
                **{f"tuning: {key}": value for key, value in given.tuning.model_dump(exclude_none=True).items()},
            }
        else:
            shipped = Package(folder)
            shipped.check()
            manifest, model = shipped.manifest, shipped.meta_model
            found |= {
                "format": f"{manifest.format} {manifest.format_version}",
                "license": manifest.license,
                "architecture": model.config.model_type,
                "parameters": model.num_parameters(),
                "dtype": manifest.dtype,
                "layers": list(manifest.layers),
                "beta": manifest.beta,
                "harmonizer rank": manifest.harmonizer.rank,
                "sound": True,
                **_told(manifest),
            }
        found["id"] = manifest_sha256(folder)
        _show(found | {"files": {name: entry.model_dump() for name, entry in manifest.files.items()}}, as_json)


@dataclass(frozen=True)
class _Settings:
    device: str
    dtype: str
    threads: int


@app.command()
def tune(
    package: Annotated[Path, typer.Argument(help="The package that came from the model owner: a folder or .zip.")],
    out: Annotated[Path, typer.Option(help="The adapter to write: a folder, or one file if the name ends in .zip.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your records: JSON Lines, a JSON list, Parquet or CSV, all with `prompt` and `completion`, or "
            "`messages`, or `text`. With --task: the task's questions, in the fields of its hub data set."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A task of lm-eval; without --data its training questions come from the hub.")
    ] = None,
    adapters: Annotated[
        Literal["layers", "lora"],
        typer.Option(help="What to tune: LoRA in every layer that the package has, or the adapter layers whole."),
    ] = "lora",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA's matrices.")] = 16,
    lora_alpha: Annotated[float, typer.Option(min=0, help="LoRA's scale, over its rank.")] = 32.0,
    lora_modules: Annotated[
        Literal["all", "attention"], typer.Option(help="Put LoRA into all matrices of a layer, or the attention's.")
    ] = "all",
    epochs: Annotated[int, typer.Option(min=1, help="Most passes over the records.")] = 10,
    patience: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Stop after so many epochs without a lower held-out loss; 0 for all epochs. 1, or 0 with --epsilon.",
        ),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the records that is held out, to know when to stop; 0 for none: all epochs run.",
        ),
    ] = 0.1,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            help="AdamW's peak learning rate, if none is given 1e-3 for LoRA and 3e-4 for layers; of several the best "
            "on what is held out."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records in a step.")] = 8,
    block_size: Annotated[int, typer.Option(min=8, help="Tokens in a block of `text`.")] = 512,
    epsilon: Annotated[
        float,
        typer.Option(min=0, help="Protect each record by differential privacy (DP-SGD) with this ε; 0 for none."),
    ] = 0.0,
    delta: Annotated[float, typer.Option(help="δ of it: less than one over the number of records.")] = 1e-5,
    seed: Annotated[
        int, typer.Option(min=0, help="Every random draw comes from it, but those that protect privacy.")
    ] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads, 0 for all.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Data owner: tune adapters in the package on your own records. What it writes is all that goes back.

    The same command goes on where it was stopped. Beside the adapter comes OUT.private.json, with the losses, which
    stays with you.
    """
    from scaleot_core.common.files import fingerprint, write_json
    from scaleot_core.common.runtime import setup
    from scaleot_core.common.validation import validate_block
    from scaleot_core.data import questions
    from scaleot_core.evaluation.tasks import check_rows
    from scaleot_core.exchange import adapter
    from scaleot_core.exchange.archive import new_output, unpacked
    from scaleot_core.exchange.package import Package
    from scaleot_core.models.loading import check_tokenizer
    from scaleot_core.params import LoraForm, OffsiteTuning
    from scaleot_core.training.checkpoint import Checkpoint
    from scaleot_core.tuning import examples
    from scaleot_core.tuning.selection import tune as tune_parameters

    if data is None and task is None:
        raise UserError("nothing to tune on: name a file with --data, or a task of lm-eval with --task")
    settings = validate_block(
        OffsiteTuning,
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr or [1e-3 if adapters == "lora" else 3e-4],
            "validation_fraction": validation,
            "patience": (0 if epsilon else 1) if patience is None else patience,
            "epsilon": epsilon,
            "delta": delta,
        },
    )
    form = {"rank": lora_rank, "alpha": lora_alpha, "modules": lora_modules}
    lora = validate_block(LoraForm, form) if adapters == "lora" else None
    with unpacked(package) as folder, new_output(out, _private(out)) as target:
        shipped = Package(folder)
        runtime = setup(_Settings(device, shipped.manifest.dtype, threads), "tune")
        model, tokenizer = shipped.load(runtime.device), shipped.tokenizer()
        check_tokenizer(tokenizer, model.config)
        if task is None:
            assert data is not None
            made = examples.from_file(model, tokenizer, data, block_size=block_size, packed=not epsilon)
        else:
            rows = questions.private(task, data)
            check_rows(task, rows, tokenizer, context_length=model.config.max_position_embeddings, part="training")
            made = examples.from_task(model, tokenizer, task, rows, block_size=block_size, packed=not epsilon)
        _check_enough(f"{data or task}", made, settings, min(block_size, made.tally.context_length))
        key = fingerprint(settings.model_dump(), lora and lora.model_dump(), seed, shipped.sha256, made)
        checkpoint = Checkpoint(out.with_name(f".{out.name}.progress") / key, PROGRESS_SECONDS)
        parameters = adapter.trainable(model, shipped.plan, lora, seed)
        seed = secrets.randbits(256) if epsilon else seed  # whoever could guess it could take the noise off
        try:
            tuned = tune_parameters(
                model,
                parameters,
                made,
                settings,
                seed=seed,
                label="tune",
                checkpoint=checkpoint,
                origins=made.origins,
            )
        except KeyboardInterrupt:
            say("interrupted; the same command goes on from here", style="yellow")
            raise
        adapter.save(target, shipped, parameters, lora=lora, tuning=settings, tuned=tuned)
    write_json(_private(out), {"validation_loss": tuned.validation_loss, "history": tuned.history}, private=True)
    checkpoint.remove()
    with suppress(OSError):  # it isn't there, or another command's progress is in it
        checkpoint.folder.parent.rmdir()
    _show(
        {
            "adapter": str(out),
            **_of_records(made),
            "learning rate": tuned.lr,
            "steps": tuned.steps,
            "held-out loss": tuned.validation_loss,
            "epsilon": tuned.epsilon,
            "private": str(_private(out)),
        },
        as_json,
    )
    say("the losses are those of the tuned package, not of the real model: what it will gain, its owner alone can tell")


def _check_enough(what: str, made: "Examples", settings: "OffsiteTuning", block_size: int) -> None:
    """UserError, in terms of the options, where no record is left to tune on beside those that are held out."""
    from scaleot_core.tuning.selection import held_out

    count = len(set(made.origins))
    if settings.epsilon or held_out(settings, count) < count:
        return
    unit = f"block{'s' * (count > 1)} of {block_size} tokens" if made.are_blocks else f"record{'s' * (count > 1)}"
    ways = ["lower --validation"] * (count > 1) + ["lower --block-size"] * made.are_blocks
    ways += [f"add --patience 0{' and one --lr alone' * (len(settings.lr) > 1)}, and all epochs run on all of it"]
    raise UserError(
        f"{what}: {count:,} {unit} can't be parted into some to tune on and some to hold out; {', or '.join(ways)}, "
        "or give more"
    )


def _of_records(made: "Examples") -> dict[str, Any]:
    """How many records there are, and what of them isn't learnt."""
    tally = made.tally
    return {
        "records": tally.records,
        "examples": len(made),
        "records cut": tally.cut,
        "tokens cut": tally.tokens_cut,
        "answers left out": tally.answers_left_out.total(),
        "answers reworded": tally.reworded,
        "fields ignored": dict(sorted(tally.ignored.items())),
    }


@app.command()
def check(adapter: AdapterArgument, package: PackageOption, as_json: AsJson = False) -> None:
    """Model owner: whether an adapter is sound and belongs to a package, and how far it moved each layer.

    Relative change is the norm of a layer's change over the norm of what was shipped; the outlier is the largest change
    of one weight over the root mean square of all changes in its tensor, about 5 for noise.
    """
    from scaleot_core.exchange.archive import unpacked
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.returned import check_adapter

    with unpacked(adapter) as folder, unpacked(package) as shipped:
        found = check_adapter(folder, Package(shipped))
    told = {"adapter": str(adapter), "sound": True, "adapters": _adapters(found.form)}
    _show_changes(told, found.layer_changes, as_json)


@app.command()
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
        typer.Option(help="A file of public text (.txt, .jsonl …), to measure the scale on."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="How strongly to plug it in, 0.5 to 3; without it and --public as it came: 1.")
    ] = None,
    max_change: Annotated[
        float | None, typer.Option(min=0, help="Refuse an adapter that changes a layer by more (relative norm).")
    ] = None,
    max_outlier: Annotated[
        float | None, typer.Option(min=0, help="Refuse an adapter with a larger outlier (see `scaleot check`).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Model owner: check an adapter and plug it into the real model. OUT loads with transformers alone.

    With --public the scale is chosen at which the change of the real model's logits on that text is as large as the
    change of the package's was. With --as-lora the adapter is written for the real model, for whoever serves LoRA.
    """
    from scaleot_core.common.files import atomic_folder
    from scaleot_core.exchange.adapter import save_peft
    from scaleot_core.exchange.archive import check_new, unpacked
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.public_text import measure_on_text
    from scaleot_core.exchange.returned import check_adapter, check_base, fitted
    from scaleot_core.exchange.scale import check_scale
    from scaleot_core.models.loading import read_model, write_model
    from scaleot_core.tuning.adapters import TunedLora, plug_in

    if out is None and as_lora is None:
        raise UserError("nothing to write: name a folder with --out, or with --as-lora")
    if public and scale is not None:
        raise UserError("--scale and --public: one of them says the scale; leave the other out")
    for new in (out, as_lora):
        if new is not None:
            check_new(new)
    strength = 1.0 if scale is None else check_scale(scale)
    with unpacked(adapter) as folder, unpacked(package) as unpacked_package:
        shipped = Package(unpacked_package)
        found = check_adapter(folder, shipped)
        if as_lora and not isinstance(found.adapter, TunedLora):
            raise UserError(f"{adapter}: it has whole layers, which are no LoRA; name --out alone")
        _check_limits(adapter, found.layer_changes, max_change, max_outlier)
        model, tokenizer = read_model(base)
        check_base(base, model, shipped)
        tuned = fitted(found.adapter, shipped, model, private or _private(package))
        measured = measure_on_text(public, shipped, model, tokenizer, found.adapter, tuned) if public else None
    strength = measured.scale if measured else strength
    if as_lora and isinstance(tuned, TunedLora):
        with atomic_folder(as_lora) as target:
            save_peft(
                target, model.config, tuned, layers=[moved.layer for moved in found.layer_changes], scale=strength
            )
    if out:
        plug_in(model, shipped.plan, tuned, strength)
        with atomic_folder(out) as target:
            write_model(model, tokenizer, target)
    told: dict[str, Any] = {"model": out and str(out), "lora": as_lora and str(as_lora), "scale": strength}
    if measured:
        told |= {"effect on the package": measured.emulator, "effect on the model": measured.model[strength]}
    _show_changes(told, found.layer_changes, as_json)


def _check_limits(
    adapter: Path, changes: "list[LayerChange]", max_change: float | None, max_outlier: float | None
) -> None:
    """UserError for the first layer that moved further than the model owner wants."""
    for moved in changes:
        for name, limit, value in (("change", max_change, moved.relative), ("outlier", max_outlier, moved.outlier)):
            if limit is not None and not value <= limit:
                raise UserError(
                    f"{adapter}: layer {moved.layer} has {name} {value:.3g}, the limit is {limit:g}; "
                    "look at `scaleot check`, then ask for another or raise the limit"
                )


def _told(manifest: "PackageManifest") -> dict[str, Any]:
    """What the model owner measured, one line a task and kind of adapters."""
    lines = {f"{task}, {kind}": r for task, kinds in manifest.figures.items() for kind, r in kinds.items()}
    return {"recovery, as its owner measured it": lines} if lines else {}


def _adapters(form: "LoraForm | None") -> str:
    """What was tuned, in words."""
    if form is None:
        return "whole adapter layers"
    where = "all matrices" if form.modules == "all" else "the attention"
    return f"LoRA of rank {form.rank} in {where} of {'all' if form.layers == 'all' else 'the adapter'} layers"


def _private(out: Path) -> Path:
    """What stays with whoever wrote `out`, beside it."""
    return out.with_name(f"{out.name}.private.json")


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    table = Table(Column(), Column(overflow="fold"), show_header=False)
    for key, value in found.items():
        if value is not None and value != {}:
            lines = (
                [f"{name}: {_text(one)}" for name, one in value.items()] if isinstance(value, dict) else [_text(value)]
            )
            table.add_row(key, "\n".join(lines))
    Console().print(table, markup=False)


def _text(value: Any) -> str:
    """A value for a person, with nothing in it that would steer a terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else printable(str(value))


def _show_changes(found: dict[str, Any], changes: "list[LayerChange]", as_json: bool) -> None:
    if as_json:
        print(json.dumps(found | {"layer_changes": [asdict(moved) for moved in changes]}))
        return
    _show(found, as_json)
    table = Table("layer", "relative change", "outlier", title="How far each adapter layer moved")
    for moved in changes:
        table.add_row(str(moved.layer), f"{moved.relative:.4f}", f"{moved.outlier:.1f}")
    Console().print(table)


def _option(parameter: str) -> str:
    """What a person at the command line calls a parameter: its own option or argument, if not by another name."""
    name = next((part for part in reversed(parameter.split(".")) if not part.isdigit()), parameter)
    return OPTIONS.get(parameter, f"--{name.replace('_', '-')}")


def main() -> None:
    """Run the command line."""
    run_command(lambda: app(prog_name="scaleot"), _option)


if __name__ == "__main__":
    main()
