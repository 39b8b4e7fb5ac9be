"""What libraries work out again and again, though the answer is the same, worked out once a process.

Both the tests' own process and the warm `python` use it. What a user starts has none of it, nor have the tests that
start Python cold.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import yaml
from jinja2 import Environment, Template


def remember(patch: pytest.MonkeyPatch) -> None:
    """Let libraries remember what they compiled and parsed, until `patch` is undone."""
    patch.setattr(Environment, "from_string", _compiled_once(Environment.from_string))
    patch.setattr(yaml, "safe_load", _parsed_once(yaml.safe_load))
    patch.setattr(inspect, "getmodule", _found_once(inspect.getmodule))


def remember_task_index(patch: pytest.MonkeyPatch) -> None:
    """Let lm-eval read the definitions in its folders once, until `patch` is undone: ten seconds each time."""
    from lm_eval.tasks import _index

    build, found = _index.TaskIndex.build, dict[tuple[Path, ...], dict[str, Any]]()

    def remembered(paths: list[Path], **options: Any) -> dict[str, Any]:
        if tuple(paths) not in found:
            found[tuple(paths)] = build(paths, **options)
        return dict(found[tuple(paths)])

    patch.setattr(_index.TaskIndex, "build", staticmethod(remembered))


def _compiled_once(compiled: Callable[..., Template]) -> Callable[..., Template]:
    """Compile a template once for its environment: lm-eval does it for every field of every question."""
    found: dict[tuple[Environment, str], Template] = {}

    def from_string(self: Environment, source: Any, *more: Any, **options: Any) -> Template:
        if more or options or not isinstance(source, str):
            return compiled(self, source, *more, **options)
        if (self, source) not in found:
            found[self, source] = compiled(self, source)
        return found[self, source]

    return from_string


def _parsed_once(parsed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Parse a text once, and give each caller a copy: a stage parses dvc.yaml and params.yaml several times."""
    found: dict[str, Any] = {}

    def safe_load(stream: Any) -> Any:
        if not isinstance(stream, str):
            return parsed(stream)
        if stream not in found:
            found[stream] = parsed(stream)
        return copy.deepcopy(found[stream])

    return safe_load


def _found_once(find: Callable[..., ModuleType | None]) -> Callable[..., ModuleType | None]:
    """Find the module of a frame once for its file: pydantic looks for that of every class of settings, among all."""
    found: dict[str, ModuleType | None] = {}

    def getmodule(thing: Any, *more: Any) -> ModuleType | None:
        if not isinstance(thing, FrameType) or more:
            return find(thing, *more)
        file = thing.f_code.co_filename
        if file not in found:
            found[file] = find(thing)
        return found[file]

    return getmodule
