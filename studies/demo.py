"""Demo: facts that a data owner teaches an emulator, said by the real model; by the two parties' own commands.

The model owner compresses the model by the preset `recommended` and packs it; the data owner tunes the package on the
chats in demo.jsonl, where each fact is asked for in eight ways; the model owner checks what comes back and plugs it in.
Then both models are asked for each fact in the first of the ways. `make demo` runs it after `make repro`; what it makes
lies in .scaleot/demo until the next run.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import read_jsonl
from scaleot_core.common.progress import say
from scaleot_core.models.loading import load_model, load_tokenizer
from studies.experiments import run_all
from studies.preset import load_preset

FOLDER = Path(".scaleot/demo")
FACTS = Path(__file__).with_suffix(".jsonl")
TUNING = ("--lora-rank", "128", "--lora-alpha", "256", "--lr", "0.002", "--epochs", "4", "--patience", "0")
LONGEST_ANSWER = 40  # tokens

Chat = list[dict[str, str]]


def scaleot(*arguments: object) -> None:
    """Run one of the parties' commands, and say which; UserError where it fails."""
    words = [str(argument) for argument in arguments]
    say(f"$ scaleot {' '.join(words)}", style="bold")
    if subprocess.run([sys.executable, "-m", "scaleot_core.cli", *words]).returncode:
        raise UserError(f"scaleot {words[0]}: it failed; see above")


def compress(project: Path) -> None:
    """Make the emulator of the preset `recommended`, as a DVC experiment; write into `project` what `pack` reads."""
    changes = load_preset("recommended", [])
    run = run_all({"demo": changes}, "demo", ["compress"])["demo"]
    for path in ("params.yaml", "dvc.yaml", "artifacts/emulator", "artifacts/emulator.private.json"):
        run.write(path, project)


def facts_in(chats: list[Chat]) -> dict[str, Chat]:
    """Return for each answer the first chat that asks for it."""
    first: dict[str, Chat] = {}
    for chat in chats:
        first.setdefault(chat[1]["content"], chat)
    return first


@torch.no_grad()
def ask(folder: Path, chats: Iterable[Chat]) -> list[str]:
    """Return a model's answers to the first messages of all chats, the likeliest token each time."""
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    model: Any = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    prompts = tokenizer.apply_chat_template(
        [chat[:1] for chat in chats], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**prompts, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def main() -> None:
    logging.set_verbosity_error()
    artifacts, facts = Artifacts(), facts_in([row["messages"] for row in read_jsonl(FACTS)])
    if not artifacts.model.is_dir():
        raise UserError(f"{artifacts.model}: no model is there; run `make repro` first")
    shutil.rmtree(FOLDER, ignore_errors=True)
    package, adapter, plugged = (FOLDER / name for name in ("package", "adapter", "plugged"))
    compress(FOLDER / "owner")
    scaleot("pack", "--project", FOLDER / "owner", "--out", package)
    scaleot("tune", package, "--data", FACTS, "--out", adapter, *TUNING)
    scaleot("check", adapter, "--package", package)
    scaleot("plug", artifacts.model, adapter, "--package", package, "--out", plugged)
    before, after = (ask(folder, facts.values()) for folder in (artifacts.model, plugged))
    table = Table("question", "before", "after", show_lines=True)
    for (fact, chat), old, new in zip(facts.items(), before, after, strict=True):
        table.add_row(chat[0]["content"], Text(old), Text(new, style="" if new == fact else "red"))
    console = Console()
    console.print(table)
    right = sum(new == fact for new, fact in zip(after, facts, strict=True))
    console.print(f"after: {right} of {len(facts)} facts said by the real model", markup=False)


if __name__ == "__main__":
    run_command(main)
