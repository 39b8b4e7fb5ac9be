"""One row of the paper's table: a preset's run as a DVC experiment, and its five measurements a task.

`make table PRESET=opt-1.3b SET="alpha=0.5"` runs it: python studies/table.py opt-1.3b alpha=0.5. An experiment that is
there already, of this commit, is read back.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from scaleot_core import report
from scaleot_core.ending import ends_in_one_line
from scaleot_core.errors import UserError
from scaleot_core.experiments import experiment_name, read_metrics, run
from scaleot_core.params import changed, load_params
from scaleot_core.report import MEASUREMENTS, write_csv

PRESETS = Path("presets.yaml")


def preset(name: str, settings: list[str]) -> dict[str, Any]:
    """What a preset changes in params.yaml, with `key=value` settings on top; UserError for one that is no such."""
    rows = {row: values for row, values in yaml.safe_load(PRESETS.read_text()).items() if not row.startswith(".")}
    if name not in rows:
        raise UserError(f"{PRESETS}: no preset is named {name!r}; there are {', '.join(rows)}")
    changes = dict(rows[name])
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{setting!r}: a setting is KEY=VALUE, such as alpha=0.5")
        changes[key] = yaml.safe_load(value)
    changed(load_params(), changes)  # a mistake is found before the run
    return changes


def main() -> None:
    if len(sys.argv) < 2:
        raise UserError(f"name a preset of {PRESETS}: python studies/table.py PRESET [KEY=VALUE ...]")
    name, settings = sys.argv[1], sys.argv[2:]
    changes = preset(name, settings)
    metrics = read_metrics(run(experiment_name("table", name, *settings), changes))
    rows = [
        (task, measurement, metric, measured[measurement][metric], measured[measurement][f"{metric}_stderr"])
        for task, measured in metrics["tasks"].items()
        for measurement in MEASUREMENTS
        for metric in measured["metrics"]
    ]
    out = Path(f"docs/studies/{experiment_name('table', name, *settings)}.csv")
    write_csv(out, ["task", "measurement", "metric", "value", "standard error"], rows)
    report.show(metrics)


if __name__ == "__main__":
    ends_in_one_line(main)
