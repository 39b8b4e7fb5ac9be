"""Runs of the pipeline with some parameters changed, as DVC experiments that are made once and read back by name.

Each runs in a folder of its own (`dvc exp run --temp`), so that the project stays as it is, and takes from DVC's cache
all that the change doesn't touch. One that was stopped is run again; one that is there isn't.
"""

import json
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from scaleot_core.errors import UserError
from scaleot_core.progress import say

Row = dict[str, Any]
"""Metrics and parameters of one experiment, by names such as `tasks.piqa.gap.acc` and `dlr.steps`."""


def experiment_name(*parts: object) -> str:
    """A name that DVC takes: words and numbers joined by hyphens."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(map(str, parts))).strip("-")


def finished() -> dict[str, Row]:
    """Experiments of the commit at hand that ended well, by name."""
    import dvc.api

    unfinished = {"Failed", "Queued", "Running"}
    return {
        row["Experiment"]: row for row in dvc.api.exp_show() if row["Experiment"] and row.get("State") not in unfinished
    }


def run(name: str, changes: Mapping[str, Any]) -> Row:
    """The row of experiment `name`, run now with these parameters if it isn't there; UserError where a run fails."""
    found = finished()
    if name not in found:
        say(f"experiment {name}", style="bold")
        settings = [f"--set-param={key}={json.dumps(value)}" for key, value in changes.items()]
        if subprocess.run(["dvc", "exp", "run", "--temp", f"--name={name}", *settings]).returncode:
            raise UserError(f"experiment {name}: it failed; see above, mend it, then run again: what is done is kept")
        found = finished()
    return found[name]


def read_metrics(row: Row) -> Any:
    """All of an experiment's metrics.json: a row has its numbers alone."""
    import dvc.api

    return json.loads(dvc.api.read("metrics.json", rev=row["rev"]))
