"""One row of the paper's table: a preset's run as a DVC experiment, and its five measurements a task.

`make table PRESET=opt-1.3b SET="alpha=0.5"` runs it: python studies/table.py opt-1.3b alpha=0.5. An experiment that is
there already, of this commit, is read back.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import write_csv
from scaleot_core.params import changed, load_params
from scaleot_core.reporting import tables
from scaleot_core.reporting.measurements import by_row
from studies.experiments import experiment_name, parse_overrides, read_metrics, run

PRESETS = Path("presets.yaml")


def preset(name: str, arguments: list[str]) -> dict[str, Any]:
    """What a preset changes in params.yaml, with `key=value` settings on top; UserError for one that is no such."""
    rows = {
        row: values
        for row, values in yaml.safe_load(PRESETS.read_text(encoding="utf-8")).items()
        if not row.startswith(".")
    }
    if name not in rows:
        raise UserError(f"{PRESETS}: no preset is named {name!r}; there are {', '.join(rows)}")
    changes = {**rows[name], **parse_overrides(arguments)}
    changed(load_params(), changes)  # a mistake is found before the run
    return changes


def main() -> None:
    if len(sys.argv) < 2:
        raise UserError(f"name a preset of {PRESETS}: python studies/table.py PRESET [KEY=VALUE ...]")
    name, arguments = sys.argv[1], sys.argv[2:]
    changes, title = preset(name, arguments), experiment_name("table", name, *arguments)
    metrics = read_metrics(run(title, changes))
    rows = [
        {
            "task": task,
            "measurement": measurement,
            "metric": metric,
            "value": found[metric],
            "standard error": found[f"{metric}_stderr"],
        }
        for task, measured in metrics["tasks"].items()
        for measurement, found in by_row(measured).items()
        for metric in measured["metrics"]
    ]
    write_csv(Path(f"docs/studies/{title}.csv"), rows)
    tables.show(metrics)


if __name__ == "__main__":
    run_command(main)
