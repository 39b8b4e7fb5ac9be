"""The data owner's last command before an adapter is sent: `audit`."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scaleot_core.cli.options import AsJson, PackageOption, setting
from scaleot_core.cli.output import private_file, show
from scaleot_core.cli.reading import read_examples
from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import say
from scaleot_core.common.validation import validate_block
from scaleot_core.params import Params
from scaleot_core.settings import Machine


def audit(
    adapter: Annotated[Path, typer.Argument(help="The adapter that is to be sent: a folder or .zip.")],
    package: PackageOption,
    data: Annotated[
        Path | None, typer.Option(help="The records that it was tuned on, as `tune` was given them.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task whose questions they are, as `tune` was given it.")] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Records of the same kind that it was not tuned on. Without it, those of --data that `tune` held out, "
            "by ADAPTER.private.json."
        ),
    ] = None,
    max_unmoved: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Largest share of a matrix's rows or columns that never moved. Without this option 0, or 0.75 "
            "where the model has ReLU.",
        ),
    ] = None,
    max_auc: Annotated[float, typer.Option(min=0.5, max=1, help="Highest AUC of a membership attack.")] = 0.8,
    max_extracted: Annotated[
        float,
        typer.Option(min=0, max=1, help="Largest share of answers said word for word, above that of held-out records."),
    ] = 0.5,
    block_size: Annotated[int, typer.Option(min=8, help="Tokens in a block of `text`.")] = 512,
    seed: Annotated[
        int | None, setting(Params, "seed", "That of `tune`; without it the one in ADAPTER.private.json.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], setting(Params, "device")] = "auto",
    threads: Annotated[int, setting(Params, "threads")] = 0,
    as_json: AsJson = False,
) -> None:
    """Data owner: what an adapter tells of the records it was tuned on, and whether it may be sent.

    Exit code 1 where it must not be.
    """
    from scaleot_core.attacks import audit as library
    from scaleot_core.common.files import read_json
    from scaleot_core.common.runtime import setup
    from scaleot_core.exchange import adapter_folder
    from scaleot_core.exchange.archive import unpacked
    from scaleot_core.exchange.foreign_tokenizer import try_tokenizer
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.suspicions import most_silent
    from scaleot_core.tuning.examples import Examples
    from scaleot_core.tuning.selection import split_records

    if data is None and task is None:
        raise UserError("name with --data, or with --task, what the adapter was tuned on")
    machine = validate_block(Machine, {"device": device, "threads": threads})
    private = read_json(private_file(adapter)) if private_file(adapter).is_file() else {}
    if seed is None and "seed" not in private:
        raise UserError(f"{private_file(adapter)}: it isn't there, and says how {adapter} was tuned; name --seed")
    with unpacked(adapter) as folder, unpacked(package) as package_folder:
        shipped = Package(package_folder)
        runtime = setup(machine.model_copy(update={"dtype": shipped.manifest.dtype}), "audit")
        tuned, manifest = adapter_folder.read(folder, shipped), adapter_folder.read_manifest(folder)
        try_tokenizer(shipped)
        packed = manifest.tuning.privacy is None
        began = datetime.fromisoformat(private["began"]) if "began" in private else None  # the date in a chat template
        records, *more = (
            read_examples(shipped, task, file, block_size=block_size, packed=packed, now=began)
            for file in ([data] if held_out is None else [data, held_out])
        )
        model = shipped.load(runtime.device)
    start_seed = private["seed"] if seed is None else seed
    members, others = split_records(records, private.get("not_tuned_on", 0), start_seed)
    if more:
        members, others = members or records, more[0]
    figures = library.audit(model, shipped.plan, tuned, members, Examples(others), seed=start_seed)
    limits = library.Limits(most_silent(model.config) if max_unmoved is None else max_unmoved, max_auc, max_extracted)
    reasons = library.reasons(figures, limits)
    show({"adapter": str(adapter), **_summary(figures), "may be sent": not reasons}, as_json)
    say(library.UNSEEN)
    if figures["membership"] is None:
        say(f"membership: not tried; it takes {library.LEAST_RECORDS} records on either side (--held-out)", "yellow")
    if reasons:
        raise UserError(
            f"{adapter}: don't send it: {'; '.join(reasons)}; tune with --epsilon, or ask for another package"
        )


def _summary(figures: dict[str, Any]) -> dict[str, Any]:
    """List an audit's figures in plain words."""
    from scaleot_core.attacks.audit import best_auc

    shares, attack = figures["unmoved"], figures["membership"]
    summary: dict[str, Any] = {
        "matrices with rows or columns that never moved": sum(share > 0 for share in shares.values()),
        "of matrices": len(shares),
        "largest share that never moved": max(shares.values()),
    }
    if attack is not None:
        auc, error = best_auc(attack)
        summary |= {"membership AUC": auc, "its standard error": error}
        summary |= {"answers said word for word": attack["extracted"]["members"]}
        summary |= {"of held-out ones": attack["extracted"]["others"]}
    return summary
