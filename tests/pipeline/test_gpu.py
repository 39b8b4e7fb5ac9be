"""Stages on a GPU give the same bytes twice, and in float32 the figures of a CPU. They skip where there is no GPU."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import change, run, snapshot, succeed, write_project
from transformers import PreTrainedTokenizerFast

from scaleot_core.common.files import read_json
from scaleot_core.methods import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible here")

STAGES = ("prepare_data", "layer_importance", "train_harmonizers", "compress", "offsite_tune", "zero_shot")
LAST = ("full_finetune", "evaluate")
LORA = ["piqa", "lora"]


def whole(folder: Path) -> Path:
    """Run the whole pipeline, with both kinds of adapters."""
    succeed(folder, *STAGES)
    assert run(folder, "offsite_tune", LORA).code == 0
    succeed(folder, *LAST)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "project"
    folder.mkdir()
    write_project(folder, tokenizer, device="cuda", adapters=["layers", "lora"])
    return whole(folder)


def artifacts(folder: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in snapshot(folder / "artifacts").items() if "cost" not in name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_on_a_gpu_give_the_same_bytes_twice(project: Path, tmp_path: Path, dtype: str) -> None:
    one, two = (Path(shutil.copytree(project, tmp_path / name)) for name in ("one", "two"))
    for folder in (one, two):
        shutil.rmtree(folder / "artifacts")
        shutil.rmtree(folder / ".scaleot", ignore_errors=True)
        change(folder, dtype=dtype, channels={"ratio": 0.3})
        whole(folder)
    assert artifacts(one) == artifacts(two)
    cost = read_json(one / "costs" / "train_harmonizers.json")
    assert cost["peak_gpu_memory_mib"] > 0


def test_a_gpu_gives_the_figures_of_a_cpu(project: Path, tmp_path: Path) -> None:
    on_cpu = Path(shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns(".scaleot")))
    shutil.rmtree(on_cpu / "artifacts")
    change(on_cpu, device="cpu")
    here, there = (read_json(folder / "metrics.json") for folder in (project, whole(on_cpu)))
    for name in ("model", "emulator"):
        assert here["corpus_perplexity"][name] == pytest.approx(there["corpus_perplexity"][name], rel=1e-2)
    for kind in ("layers", "lora"):
        for measurement in ("emulator_finetune", "plug_in"):
            ours, theirs = (each["tasks"]["piqa"]["adapters"][kind][measurement] for each in (here, there))
            assert ours["answer_nll"] == pytest.approx(theirs["answer_nll"], rel=1e-2)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_makes_the_same_package_twice(project: Path, tmp_path: Path, method: str) -> None:
    made = []
    for name in ("one", "two"):
        folder = Path(shutil.copytree(project, tmp_path / name, ignore=shutil.ignore_patterns(".scaleot")))
        change(folder, method=method, distill={"steps": 3})
        succeed(folder, "compress", "offsite_tune")
        made.append(artifacts(folder))
    assert made[0] == made[1]
