"""The model owner's command `trace`: whose package a leak was made from."""

from pathlib import Path
from typing import Annotated

import typer

from scaleot_core.cli.options import AsJson
from scaleot_core.cli.output import show
from scaleot_core.common.errors import UserError


def trace(
    leak: Annotated[Path, typer.Argument(help="What came to light: a package, or a transformers folder of one.")],
    private: Annotated[
        list[Path],
        typer.Option(help="What `pack --recipient` wrote for you beside a package; once for each recipient."),
    ],
    project: Annotated[
        Path, typer.Option(help="The folder in which the pipeline was run, with the emulator as it was packed.")
    ] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Model owner: name the recipient whose package a leak was made from, or say that it can't be told.

    A score is about a standard normal number for a recipient who has nothing to do with the leak. One is named from
    the threshold on, at which the chance of a false accusation is at most one in a million.
    """
    from scaleot_core.artifacts import Artifacts
    from scaleot_core.common.files import read_json
    from scaleot_core.exchange.archive import unpacked
    from scaleot_core.exchange.package import Package
    from scaleot_core.exchange.watermark import Weights, named, recipient_key, scores, threshold

    emulator = Package(Artifacts(project / "artifacts").emulator, links=True)
    marks = {}
    for file in private:
        mark = read_json(file).get("mark")
        if not mark:
            raise UserError(f"{file}: its package has no mark; only `pack --recipient` puts one in")
        if mark["unmarked"] != emulator.sha256:
            raise UserError(
                f"{file}: its package was made from another emulator than {emulator.folder} has; run `dvc repro` with "
                "the parameters that the file names"
            )
        marks[mark["recipient"]] = mark
    keys = [recipient_key(mark["secret"], recipient) for recipient, mark in marks.items()]
    tensors = next(iter(marks.values()))["tensors"]
    with unpacked(leak) as folder:
        values = scores(Weights(folder), Weights(emulator.folder), emulator.config, tensors, keys)
    by_recipient = dict(zip(marks, values, strict=True))
    recipients = named(by_recipient)
    verdict = f"made from the package of {' and '.join(recipients)}" if recipients else "it can't be told"
    summary = {"leak": str(leak), "recipients": recipients, "scores": by_recipient, "threshold": threshold(len(marks))}
    show(summary if as_json else {**summary, "recipients": verdict}, as_json)
