"""Put a preset of presets.yaml into params.yaml, and say what that changes: `make repro PRESET=recommended`.

Values that another preset put there before are first set back to those of the last commit, which is all that
`PRESET=default` does; your own stay. Comments and layout stay as they are.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_file
from scaleot_core.common.progress import say
from scaleot_core.params import changed, load_params
from studies.experiments import parse_overrides

PRESETS, PARAMS = Path("presets.yaml"), Path("params.yaml")


def presets() -> dict[str, dict[str, Any]]:
    """Read all presets: what each changes in params.yaml."""
    entries = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))
    return {name: changes for name, changes in entries.items() if not name.startswith(".")}


def load_preset(name: str, overrides: list[str]) -> dict[str, Any]:
    """Read what a preset changes, with `key=value` settings on top; UserError for no such preset or a wrong value."""
    if name not in presets():
        raise UserError(f"{PRESETS}: no preset is named {name!r}; there are {', '.join(presets())}")
    changes = {**presets()[name], **parse_overrides(overrides)}
    changed(load_params(), changes)
    return changes


class Span(NamedTuple):
    """Where the text of a parameter's value begins and ends in params.yaml, and what it says."""

    start: int
    end: int
    column: int
    value: Any


def spans(text: str) -> dict[str, Span]:
    """Find the values of all parameters, by names such as `dlr.steps`."""

    def walk(node: Any, prefix: str) -> dict[str, Span]:
        inner: dict[str, Span] = {}
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode):
                inner |= walk(value, f"{prefix}{key.value}.")
            else:
                block_list = isinstance(value, yaml.SequenceNode) and not value.flow_style
                end = (value.value[-1] if block_list else value).end_mark.index  # without the comments behind a list
                start = value.start_mark
                parsed = yaml.safe_load(" " * start.column + text[start.index : end])
                inner[f"{prefix}{key.value}"] = Span(start.index, end, start.column, parsed)
        return inner

    return walk(yaml.compose(text, Loader=yaml.SafeLoader), "")


def edit(text: str, values: Mapping[str, str]) -> str:
    """Replace the texts of parameters' values; comments behind them begin in the file's usual column if they can."""
    places = spans(text)
    columns = Counter(line.index(" #") + 1 for line in text.splitlines() if " #" in line)
    for name in sorted(values, key=lambda name: places[name].start, reverse=True):
        start, end = places[name].start, places[name].end
        before, rest = text[:start] + values[name], text[end:]
        if re.match(" +#", rest) and "\n" not in text[start:end] + values[name]:
            width = len(before) - before.rindex("\n") - 1
            rest = " " * max(1, columns.most_common(1)[0][0] - width) + rest.lstrip(" ")
        text = before + rest
    return text


def as_text(value: Any, span: Span, text: str) -> str:
    """Write a value as YAML, a list as the one that is there: a line an item, or all in one."""
    if isinstance(value, list) and text[span.start] == "-":
        return ("\n" + " " * span.column).join(f"- {item}" for item in value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def apply(name: str) -> None:
    """Put a preset into params.yaml; say what changes."""
    changes, text = load_preset(name, []), PARAMS.read_text(encoding="utf-8")
    shown = subprocess.run(["git", "show", f"HEAD:./{PARAMS}"], capture_output=True, encoding="utf-8")
    committed = shown.stdout if shown.returncode == 0 else text
    now, before, values = spans(text), spans(committed), dict[str, str]()
    for key, span in now.items():
        if key in changes:
            if span.value != changes[key]:
                values[key] = as_text(changes[key], span, text)
        elif key in before and any(key in preset and preset[key] == span.value for preset in presets().values()):
            values[key] = committed[before[key].start : before[key].end]
    text = edit(text, values)
    with atomic_file(PARAMS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for key, span in spans(text).items():
        if span.value != now[key].value:
            say(f"{PARAMS}: {key} is {span.value}, was {now[key].value}")


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError(f"name a preset of {PRESETS}: make repro PRESET=recommended")
    apply(sys.argv[1])


if __name__ == "__main__":
    run_command(main)
