"""Print what commands answer: a table or, with `--json`, one object; and name the file of what stays private."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from scaleot_core.common.errors import UserError, printable
from scaleot_core.settings import LoraForm

if TYPE_CHECKING:
    from scaleot_core.exchange.returned import LayerChange


def private_file(out: Path) -> Path:
    """Name the file, beside `out`, of what stays with whoever wrote `out`; UserError where `out` has no name."""
    if not out.name:
        raise UserError(f"{out}: it is there already; name another")
    return out.with_name(f"{out.name}.private.json")


def show(summary: dict[str, Any], as_json: bool, rows: Mapping[str, str] = MappingProxyType({})) -> None:
    """Print a summary: one JSON object, or a table with a line for each key that is neither None nor empty.

    `rows` renames keys in the table.
    """
    if as_json:
        print(json.dumps(summary))
        return
    table = Table(Column(), Column(overflow="fold"), show_header=False)
    for key, value in summary.items():
        if value is not None and value != {}:
            items = value.items() if isinstance(value, dict) else ()
            lines = [f"{name}: {_text(item)}" for name, item in items] or [_text(value)]
            table.add_row(rows.get(key, key), "\n".join(lines))
    Console().print(table, markup=False)


def show_changes(summary: dict[str, Any], changes: "list[LayerChange]", as_json: bool) -> None:
    """Print a summary and how far an adapter moved each layer."""
    if as_json:
        print(json.dumps(summary | {"layer_changes": [asdict(change) for change in changes]}))
        return
    show(summary, as_json)
    table = Table("layer", "relative change", "its tensors' largest", "outlier", title="How far each layer moved")
    for change in changes:
        table.add_row(str(change.layer), f"{change.relative:.4f}", f"{change.tensor:.4f}", f"{change.outlier:.1f}")
    Console().print(table)


def describe_adapters(form: LoraForm | None) -> str:
    """Say what was tuned: whole layers, or LoRA of some form."""
    if form is None:
        return "whole adapter layers"
    where = "all matrices" if form.modules == "all" else "the attention"
    return f"LoRA of rank {form.rank} in {where} of {'all' if form.layers == 'all' else 'the adapter'} layers"


def _text(value: Any) -> str:
    """Write a value for a person, without what would steer a terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
