"""Find a task's definition in lm-evaluation-harness, or among our own; say what a name is that isn't one.

lm-eval is imported where it is used: it takes seconds.
"""

import difflib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaleot_core.common.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OWN_TASKS = Path(__file__).parent / "lm_tasks"
OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood_rolling")


@cache
def task_manager(name: str) -> "TaskManager":
    """Return a task manager that knows `name`, kept for the next call; UserError if lm-eval doesn't know it.

    Indexing all of lm-eval takes half a minute. So the folders named like the task come first, then those whose
    definitions have the name in their text, which takes a second or two to read.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    packaged = Path(lm_eval.__file__).parent / "tasks"
    likely = [folder for folder in packaged.iterdir() if folder.is_dir() and name.startswith(folder.name)]
    for folders in (lambda: likely, lambda: _naming(name, packaged)):
        manager = _indexed(*folders())
        if name in manager.all_subtasks:
            return manager
        if hint := _hint(name, manager):
            raise UserError(hint, parameter="tasks")
    if near := difflib.get_close_matches(name, _all_names(packaged), n=3):
        raise UserError(f"{name!r} is no task of lm-eval; did you mean {', '.join(near)}?", parameter="tasks")
    manager = TaskManager(include_path=str(OWN_TASKS))
    if name not in manager.all_subtasks:
        raise UserError(f"{name!r} is no task of lm-eval; `lm-eval ls tasks` lists them", parameter="tasks")
    return manager


def _indexed(*folders: Path) -> "TaskManager":
    """Return a task manager of our own tasks and of those in some folders of lm-eval."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[*map(str, folders), str(OWN_TASKS)], include_defaults=False)


def _naming(name: str, packaged: Path) -> list[Path]:
    """Return the folders of definitions that call a task, a group or a tag by a name, whatever the case."""
    key = "(?:[\"']?(?:task|group|tag)[\"']?\\s*:|-)"
    line = re.compile(f"^\\s*{key}\\s*[\"']?{re.escape(name)}[\"']?\\s*$".encode(), re.MULTILINE | re.IGNORECASE)
    folders = {file.parent for file in packaged.rglob("*yaml") if line.search(file.read_bytes())}
    if len(folders) > 1:  # a group and its tasks may lie in several folders of one
        folders = {packaged / folder.relative_to(packaged).parts[0] for folder in folders}
    return sorted(folders)


def _all_names(packaged: Path) -> list[str]:
    """Return what lm-eval's definitions say after `task:`."""
    line = re.compile(r"^\s*[\"']?task[\"']?\s*:\s*[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)
    texts = (file.read_text(encoding="utf-8") for file in packaged.rglob("*yaml"))
    return sorted(
        {*(found for text in texts for found in line.findall(text)), *(f.stem for f in OWN_TASKS.glob("*.yaml"))}
    )


def _hint(name: str, manager: "TaskManager") -> str:
    """Say what a name is that is no task, as far as a task manager knows it: a group of tasks, or of another case."""
    if name in manager.all_groups or name in manager.all_tags:
        members = sorted(_members(name, manager))
        return f"{name!r} is a group of {len(members)} tasks of lm-eval; name tasks, such as {', '.join(members[:3])}"
    same = [task for task in manager.all_subtasks if task.lower() == name.lower()]
    return f"{name!r} is no task of lm-eval; did you mean {same[0]}?" if same else ""


def _members(name: str, manager: "TaskManager") -> set[str]:
    """Return the tasks of a group or tag, and of the groups in it."""
    entry = manager.task_index.get(name)
    if entry is None or name in manager.all_subtasks:
        return {name}
    inside = (entry.cfg or {}).get("task", ()) if name in manager.all_groups else entry.tags
    named = (member if isinstance(member, str) else member.get("task", member.get("group")) for member in inside)
    return set().union(*(_members(member, manager) for member in named if isinstance(member, str)))


def task_config(name: str) -> dict[str, Any]:
    """Read a task's definition as lm-eval does: dataset_path, dataset_name, the splits, the prompts.

    `training_split` is None where it names none, as some do whose data has one: lm-eval needs it only for examples in
    the prompt. UserError for an unknown task, or one that can't be tuned and scored here.
    """
    manager = task_manager(name)
    config = dict(manager.task_index[name].cfg or {})
    if config.get("output_type", "generate_until") not in OUTPUT_TYPES:
        raise UserError(
            f"{name!r} is of type {config['output_type']!r}; use one of {', '.join(OUTPUT_TYPES)}", parameter="tasks"
        )
    config["training_split"] = config.get("training_split")
    if not evaluated_split(config):
        raise UserError(f"{name!r} has neither a test nor a validation split to evaluate on", parameter="tasks")
    if config["training_split"] == evaluated_split(config):
        raise UserError(f"{name!r} is scored on its training split, so its score is meaningless", parameter="tasks")
    return config


def evaluated_split(config: Mapping[str, Any]) -> str | None:
    """Name the split that a definition scores."""
    return config.get("test_split") or config.get("validation_split")
