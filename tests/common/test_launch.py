"""One process is one process, whatever the environment says; several meet, or are refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, write_project
from transformers import PreTrainedTokenizerFast

from scaleot_core.common import launch
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.progress import console, say

LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
LEFT_BEHIND = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables, which come back at the end."""
    for name in LAUNCHED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(console, "quiet", False)
    return monkeypatch


@pytest.mark.parametrize("size", [None, "1", "0", "", "two"])
def test_rank_counts_only_beside_a_world_of_several(environment: pytest.MonkeyPatch, size: str | None) -> None:
    environment.setenv("RANK", "1")
    if size is not None:
        environment.setenv("WORLD_SIZE", size)
    assert (launch.world_size(), launch.local_world_size(), launch.rank()) == (1, 1, 0)
    assert launch.is_main_process()
    launch.check_launch()
    assert not LAUNCHED.keys() & os.environ.keys()  # lm-eval and Accelerate would read them


def test_several_are_as_the_launcher_says(environment: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        environment.setenv(name, value)
    launch.check_launch()
    assert (launch.world_size(), launch.rank(), launch.is_main_process()) == (2, 1, False)
    environment.setenv("WORLD_SIZE", "8")
    assert launch.local_world_size() == 2
    environment.delenv("LOCAL_WORLD_SIZE")
    assert launch.local_world_size() == 8


def test_first_process_alone_speaks(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1"):
        for name, value in (LAUNCHED | {"RANK": rank}).items():
            environment.setenv(name, value)
        run_command(lambda: say(f"from {launch.rank()}"))
    assert capsys.readouterr() == ("", "from 0\n")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")), "no RANK, LOCAL_RANK, MASTER_ADDR, MA"),
        (
            {"LOCAL_RANK": None},
            "WORLD_SIZE = 2 but no LOCAL_RANK: start it by torchrun",
        ),  # as a pod of PyTorchJob has it
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"RANK": "2"}, "WORLD_SIZE = 2 and RANK = '2'"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"RANK": "first"}, "RANK = 'first'"),
    ],
)
def test_world_that_cannot_meet_is_refused_by_whichever_process_it_is(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: dict[str, str | None], said: str
) -> None:
    for name, value in (LAUNCHED | changed).items():
        if value is not None:
            environment.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: pytest.fail("it went on"))
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: the environment has WORLD_SIZE = ") and said in err and "unset WORLD_SIZE" in err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny project that one process prepared, though what is left of a launcher says that it is one of several."""
    folder = tmp_path_factory.mktemp("launch")
    write_project(folder, tokenizer)
    run_python(sys.executable, folder, "stages/prepare_data.py", **LEFT_BEHIND)
    return folder


def run_python(python: str | Path, folder: Path, *arguments: str, **environment: str) -> str:
    """Run Python in a project; return what it said on stderr."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=clean | own | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_stages_of_one_process_write_and_speak_whatever_is_left_of_a_launcher(prepared: Path) -> None:
    said = run_python(sys.executable, prepared, "stages/zero_shot.py", "piqa", **LEFT_BEHIND)
    assert "1 threads" in said and "processes" not in said
    found = json.loads((prepared / "artifacts/baselines/zero_shot-piqa.json").read_text(encoding="utf-8"))
    assert found["questions"] == 20 and 0 <= found["acc"] <= 1


TOGETHER = """
import json, sys
import torch
from scaleot_core.common import distributed, launch
from scaleot_core.training.gradients import sum_gradients

distributed.init_process_group(cpu=True)
first = launch.is_main_process()
weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
if not first:  # the first process has no gradient of the first weight, and none has one of the last
    weights[0].grad = torch.ones(2)
weights[1].grad = torch.full((2,), 1.0 + launch.rank())
sum_gradients(weights)
distributed.barrier()
found = {
    "sum": distributed.all_reduce_sum(0.1 + launch.rank()),
    "any": [distributed.any_process(not first), distributed.any_process(False)],
    "from main": distributed.broadcast_from_main(lambda: {"nan": None, "list": [1.5, "ü"], "rank": launch.rank()}),
    "gradients": [None if weight.grad is None else weight.grad.tolist() for weight in weights],
    "share": distributed.shard_batch(torch.arange(5)).tolist(),
}
with open(f"{launch.rank()}.json", "w") as out:
    json.dump(found, out)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_sum_broadcast_and_wait(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER, encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "together.py"]
    run_python(sys.executable, tmp_path, *command)
    found = [json.loads((tmp_path / f"{i}.json").read_text(encoding="utf-8")) for i in range(2)]
    assert [each.pop("share") for each in found] == [[0, 2, 4], [1, 3]]
    assert (
        found[0]
        == found[1]
        == {
            "sum": 0.1 + 1.1,
            "any": [True, False],
            "from main": {"nan": None, "list": [1.5, "ü"], "rank": 0},
            "gradients": [[1.0, 1.0], [3.0, 3.0], None],
        }
    )


@pytest.mark.slow
def test_one_process_does_not_load_accelerates_state(tmp_path: Path) -> None:
    """Transformers loads Accelerate where it needs it; our helpers ask nothing of it while there is one process."""
    script = (
        "import sys\nfrom scaleot_core.common import distributed, files, progress\n"
        "distributed.barrier(); assert distributed.all_reduce_sum(2.5) == 2.5\n"
        "assert distributed.broadcast_from_main(lambda: 3) == 3 and not distributed.any_process(False)\n"
        "assert 'accelerate' not in sys.modules\n"
    )
    run_python(sys.executable, tmp_path, "-c", script)
