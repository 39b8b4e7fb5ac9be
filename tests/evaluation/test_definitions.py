"""A task's definition is found in lm-eval, and a name that is none is told with what it may have meant."""

from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from helpers import refusal

from scaleot_core.evaluation import definitions
from scaleot_core.evaluation.definitions import task_config, task_manager


@pytest.mark.slow
def test_unknown_task_has_a_hint() -> None:
    assert "did you mean piqa" in refusal(task_config, "piqaa")


@pytest.mark.slow
def test_unknown_task_like_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    assert "'zzz' is no task of lm-eval; `lm-eval ls tasks`" in refusal(task_config, "zzz")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("lambada_openai", "'loglikelihood'; use one of multiple_choice, generate_until, loglikelihood_rolling"),
        ("aime", "scored on its training split"),
        ("PIQA", "'PIQA' is no task of lm-eval; did you mean piqa?"),
        ("arc_Easy", "did you mean arc_easy?"),
        ("mmlu", "is a group of 57 tasks of lm-eval; name tasks, such as mmlu_abstract_algebra"),
        ("ai2_arc", "is a group of 2 tasks of lm-eval; name tasks, such as arc_challenge, arc_easy"),
    ],
)
def test_name_that_cannot_be_used_is_told_why(task: str, message: str) -> None:
    refused = refusal(task_config, task)
    assert refused.startswith(f"tasks: {task!r}") and message in refused


@pytest.mark.slow
def test_task_of_another_folder_is_found_once_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """BoolQ's definition lies in a folder of another name; indexing all of lm-eval takes half a minute."""
    options: list[dict[str, Any]] = []

    class Counted(lm_eval.tasks.TaskManager):
        def __init__(self, **more: Any) -> None:
            options.append(more)
            super().__init__(**more)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Counted)
    task_manager.cache_clear()
    for _ in range(3):
        assert task_config("boolq")["dataset_path"]
    assert len(options) <= 2 and all(option["include_defaults"] is False for option in options)


def test_every_task_of_lm_eval_can_be_found_by_its_text() -> None:
    """As far as four folders go: the names that the definitions say are those that lm-eval indexes."""
    packaged = Path(lm_eval.tasks.__file__).parent
    for folder in ("glue", "arc", "super_glue", "aradice"):
        names = set(definitions._all_names(packaged / folder))
        assert set(definitions._indexed(packaged / folder).all_subtasks) <= names
