"""Fingerprint what the user brings (model, questions, corpus), so that DVC notices when it changes.

A local file or folder is told by its content, a large file by its size and time of change, and what lies on the hub by
its commit. Imports nothing heavy: this runs at every `dvc repro`.
"""

import os
from pathlib import Path
from typing import Any

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import sha256
from scaleot_core.data.local_files import is_path
from scaleot_core.params import Params

LARGE = 2**30  # bytes: reading more than this at every `dvc repro` would take seconds


def local_fingerprint(path: Path) -> dict[str, Any]:
    """Fingerprint a file, or every file below a folder but hidden ones, by its path inside. Links are followed."""
    if not path.is_dir():
        return {"": _file_fingerprint(path)}
    files, seen = dict[str, Path](), set[str]()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        seen.add(real)  # a link may lead back to a folder above it
        for name in names:
            file = Path(folder) / name
            if not name.startswith(".") and file.is_file():
                files[file.relative_to(path).as_posix()] = file
    return {name: _file_fingerprint(file) for name, file in sorted(files.items())}


def _file_fingerprint(file: Path) -> dict[str, Any]:
    status = file.stat()
    if status.st_size > LARGE:
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {"sha256": sha256(file)}


def hub_fingerprint(repository: str, revision: str, kind: str) -> dict[str, Any]:
    """Return the commit that a revision of a hub repository stands for; `kind` is `model` or `dataset`.

    Without network it is the commit in the hub's local cache, or None where that has none.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    branch = revision or "main"
    try:
        commit = HfApi().repo_info(repository, revision=branch, repo_type=kind, timeout=10).sha
    except Exception:  # no network, or no such repository: the stage that reads it says which
        cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind) / "refs" / branch
        commit = cached.read_text(encoding="utf-8").strip() if cached.is_file() else None
    return {"repository": repository, "revision": branch, "commit": commit}


def source_fingerprint(source: str, revision: str, kind: str, root: Path) -> dict[str, Any]:
    """Fingerprint one source: `embedded`, a path (relative ones below `root`), or a repository on the hub.

    UserError for a path that isn't there.
    """
    if source == "embedded":  # whose lock is a dependency of its own
        return {"embedded": True}
    path = root / Path(source).expanduser()
    if path.exists():
        return {"local": local_fingerprint(path)}
    if is_path(source):
        raise UserError("no such file or folder; correct the path", value=source)
    return {"hub": hub_fingerprint(source, revision, kind)}


def source_fingerprints(params: Params) -> dict[str, Any]:
    """Fingerprint the model, the questions and the corpus that the parameters name.

    Relative paths lie below the project's folder, also in the folder of an experiment.
    """
    data, root = params.data, Path(os.environ.get("DVC_ROOT", "."))

    def local(parameter: str, source: str, revision: str, kind: str) -> dict[str, Any]:
        try:
            return source_fingerprint(source, revision, kind, root)
        except UserError as error:
            raise UserError(error.message, parameter=parameter, value=source) from None

    if data.questions == "hub":
        from scaleot_core.evaluation.definitions import task_config  # takes seconds

        names = {task: task_config(task)["dataset_path"] for task in params.tasks}
        questions = {task: hub_fingerprint(name, data.questions_revision, "dataset") for task, name in names.items()}
    else:
        questions = local("data.questions", data.questions, "", "dataset")
    return {
        "model": local("model", params.model, params.model_revision, "model"),
        "questions": questions,
        "corpus": local("data.corpus", data.corpus, data.corpus_revision, "dataset"),
    }
