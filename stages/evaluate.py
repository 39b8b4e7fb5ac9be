"""Stage evaluate: the five measurements of every task, metrics.json, curves and pictures.

Reads everything. Each finished measurement is kept until the stage ends, so that a stopped evaluation goes on.
"""

from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, read_json, write_json
from scaleot_core.exchange.package import Package
from scaleot_core.pipeline import run_stage
from scaleot_core.reporting import figures, tables
from scaleot_core.results import collect, loss_histories, measure

PLOTS, METRICS = Path("plots"), Path("metrics.json")


def main() -> None:
    with run_stage("evaluate") as stage:
        params, artifacts = stage.params, stage.artifacts
        questions = {task: artifacts.questions(task, "eval") for task in params.tasks}
        batch_size, cache = params.evaluate.batch_size, stage.checkpoint.folder
        evaluated = measure(artifacts, questions, params.adapters, stage.runtime, batch_size=batch_size, cache=cache)
        metrics = collect(artifacts, questions, evaluated)
        histories = loss_histories(artifacts, params.tasks, params.adapters)
        layers = read_json(artifacts.harmonizers / "scores.json") | {
            "kinds": [layer.kind for layer in Package(artifacts.emulator, links=True).plan]
        }
        with atomic_folder(PLOTS) as out:
            tables.write_curves(out / "loss", histories)
            tables.write_layers(out / "layers.csv", layers["prior"], layers["scores"], layers["kinds"])
            figures.save_png(figures.measurements(metrics["tasks"]), out / "measurements.png")
            figures.save_png(figures.layers(layers), out / "layers.png")
            figures.save_png(figures.curves(histories), out / "curves.png")
        write_json(METRICS, metrics)
        tables.show(metrics)


if __name__ == "__main__":
    run_command(main)
