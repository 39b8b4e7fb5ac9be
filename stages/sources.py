"""Stage sources: fingerprint what the user brings, so that an edit of it is noticed. Runs at every `dvc repro`."""

import os
from pathlib import Path

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import write_json
from scaleot_core.data.fingerprints import hub_fingerprint, source_fingerprint
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


def main() -> None:
    params = load_params()
    sources = {
        "model": source_fingerprint(params.model, params.model_revision, "model", ROOT),
        "questions": question_sources(params),
        "corpus": source_fingerprint(params.data.corpus, params.data.corpus_revision, "dataset", ROOT),
    }
    write_json(OUT, sources)


if __name__ == "__main__":
    run_command(main)
