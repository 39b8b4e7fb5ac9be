"""The report: report.html from the last run, and from attack, sweep and comparison where they were made.

`make report` runs it. The page opens from the disk, with no network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_csv, read_json
from scaleot_core.common.progress import say
from scaleot_core.exchange.manifest import manifest_sha256
from scaleot_core.params import load_params
from scaleot_core.pipeline import COSTS
from scaleot_core.reporting import html

PLOTS, STUDIES, OUT = Path("plots"), Path("docs/studies"), Path("report.html")
ATTACK, RESTORATION = Path("attack.json"), Path("artifacts/attack/restoration.csv")
PACKAGE = Path("artifacts/emulator")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested parameters as `dlr.steps`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def main() -> None:
    params, metrics = load_params(), read_json(Path("metrics.json"))
    rows = read_csv(PLOTS / "layers.csv")
    layers = {
        name: [row[column] for row in rows]
        for name, column in (("prior", "prior"), ("scores", "score"), ("kinds", "kind"))
    }
    histories = {file.stem: read_csv(file) for file in sorted((PLOTS / "loss").glob("*.csv"))}
    sweep, compared, attacks = (
        read_csv(STUDIES / f"{name}.csv") if (STUDIES / f"{name}.csv").exists() else []
        for name in ("sweep", "compare", "attacks")
    )
    attack = (read_json(ATTACK), read_csv(RESTORATION)) if ATTACK.exists() and RESTORATION.exists() else None
    if attack and attack[0]["package"] != manifest_sha256(PACKAGE):
        raise UserError(f"{ATTACK}: it is of another package than {PACKAGE}; run `make attack` again, or delete it")
    costs = {file.stem: read_json(file) for file in sorted(COSTS.glob("*.json"))}
    parts = html.sections(
        metrics, layers, histories, costs=costs, sweep=sweep, compared=compared, attacks=attacks, attack=attack
    )
    settings = [{"parameter": name, "value": str(value)} for name, value in flatten(params.model_dump()).items()]
    versions = [{"library": name, "version": version} for name, version in metrics["versions"].items()]
    parts.append(html.Section("Parameters and versions", tables=[html.table(settings), html.table(versions)]))
    summary = {"model": params.model, "method": params.method, "α, β": f"{params.alpha:g}, {params.beta:g}"}
    html.write(OUT, f"ScaleOT on {', '.join(params.tasks)}", html.answer(metrics), summary, parts)
    say(f"{OUT}: {OUT.stat().st_size:,} bytes; open it in a browser")


if __name__ == "__main__":
    run_command(main)
