"""Stage sources: fingerprint what the user brings, so that an edit of it is noticed. Runs at every `dvc repro`."""

import os
from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_json
from scaleot_core.data.sources import hub_fingerprint, source_fingerprint
from scaleot_core.params import Params, load_params

OUT = Path("artifacts/sources.json")
ROOT = Path(os.environ.get("DVC_ROOT", "."))  # the project's folder, also from the folder of an experiment


def question_sources(params: Params) -> dict[str, object]:
    data = params.data
    if data.questions != "hub":
        return source_fingerprint(data.questions, "", "dataset", ROOT)
    from scaleot_core.evaluation.definitions import task_config  # takes seconds

    names = {task: task_config(task)["dataset_path"] for task in params.tasks}
    return {task: hub_fingerprint(name, data.questions_revision, "dataset") for task, name in names.items()}


def fingerprints(params: Params) -> dict[str, object]:
    """Fingerprint the model, the questions and the corpus that these parameters name."""
    data = params.data
    return {
        "model": source_fingerprint(params.model, params.model_revision, "model", ROOT),
        "questions": question_sources(params),
        "corpus": source_fingerprint(data.corpus, data.corpus_revision, "dataset", ROOT),
    }


def main() -> None:
    write_json(OUT, fingerprints(load_params()))


if __name__ == "__main__":
    run_command(main)
