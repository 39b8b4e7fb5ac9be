"""Around a stage: named draws, the device, its cost, and how it ends."""

import errno
import os
from typing import get_args

import pytest
import torch
from test_files import refusal
from transformers.utils import logging

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.runtime import DTYPES, Runtime, generator, setup
from scaleot_core.params import Params
from scaleot_core.training.cost import Meter

CPU = Runtime(torch.device("cpu"), torch.float32)

# --- named draws -----------------------------------------------------------------------------------------


def draw(*names):
    return torch.rand(4, generator=generator(*names)).tolist()


def test_draw_is_a_function_of_seed_and_names_only():
    first = draw(3, "tuning", 7)
    torch.manual_seed(99)
    draw(3, "tuning", 8)
    assert draw(3, "tuning", 7) == first
    assert generator(0, "harmonizers").initial_seed() == 60932426638459748  # and the same in every process


def test_every_seed_and_name_has_its_own_draws():
    names = [(0,), (1,), (0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), (0, "a", 10), (0, "b", 1)]
    assert len({tuple(draw(*each)) for each in names}) == len(names)


def test_named_draws_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(0, "a")
    assert torch.equal(torch.rand(3), expected)


# --- the device ------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Pretends that a GPU is there or not; puts back what `setup` sets for the process."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), logging.get_verbosity()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    yield lambda gpu: monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    logging.set_verbosity(before[2])


@pytest.mark.parametrize(
    ("device", "gpu", "found"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_device_is_the_one_asked_for(params, machine, device, gpu, found):
    machine(gpu)
    assert setup(params.model_copy(update={"device": device}), "here").device.type == found


def test_missing_gpu_is_refused(params, machine):
    machine(gpu=False)
    said = refusal(setup, params.model_copy(update={"device": "cuda"}), "here")
    assert said.startswith("device = 'cuda': ") and "auto or cpu" in said


def test_every_dtype_that_params_allow_is_known():
    assert set(get_args(Params.model_fields["dtype"].annotation)) == DTYPES.keys()
    assert all(str(dtype) == f"torch.{name}" for name, dtype in DTYPES.items())


@pytest.mark.parametrize(("threads", "found"), [(2, 2), (0, 3)])
def test_setup_sets_precision_threads_and_deterministic_kernels_and_says_so(
    params, machine, monkeypatch, capsys, threads, found
):
    machine(gpu=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    got = setup(params.model_copy(update={"dtype": "float16", "threads": threads}), "compress")
    assert got.dtype == torch.float16 and torch.get_num_threads() == found
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert capsys.readouterr() == ("", f"compress: on cpu in float16, {found} threads\n")


# --- cost ------------------------------------------------------------------------------------------------


def test_tokens_through_the_model_are_counted(model):
    meter = Meter(CPU)
    meter.count(model)
    model(input_ids=torch.ones(2, 5, dtype=torch.long))
    model.base_model(input_ids=torch.ones(3, 4, dtype=torch.long))
    model(inputs_embeds=model.get_input_embeddings()(torch.ones(1, 7, dtype=torch.long)))
    assert meter.read()["tokens"] == 2 * 5 + 3 * 4 + 7


# --- how a stage ends ------------------------------------------------------------------------------------


def ending(capsys, error) -> tuple[int, str]:
    """Exit code of a stage that raises, and what it printed on stderr; nothing goes to stdout."""

    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run_command(main)
    out, err = capsys.readouterr()
    assert out == ""
    return left.value.code, err


def test_user_error_is_one_line_as_it_was_written(capsys):
    said = "params.yaml: [bold]tasks[/bold] = ['piqa']: " + "far longer than a terminal is wide " * 10 + "; mend it"
    assert ending(capsys, UserError(said)) == (1, f"error: {said}\n")


def test_interruption_exits_with_130(capsys):
    code, said = ending(capsys, KeyboardInterrupt())
    assert code == 130 and said.startswith("interrupted; ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "artifacts/model"), "artifacts/model: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "metrics.json"), "metrics.json: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file: No space left"),
        (OSError("something else"), "something else"),
    ],
)
def test_trouble_with_a_file_is_one_line(capsys, error, said):
    code, printed = ending(capsys, error)
    assert code == 1 and printed.startswith("error: ") and said in printed and printed.count("\n") == 1


def test_trouble_that_another_library_tells_at_length_is_one_line(capsys):
    code, printed = ending(capsys, OSError("the hub can't be reached\nand here is a page about it\nand another"))
    assert code == 1 and "the hub can't be reached" in printed and printed.count("\n") == 1


def test_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_command(main)


def test_stage_that_ends_well_says_nothing(capsys):
    done = []
    run_command(lambda: done.append(1))
    assert done == [1] and capsys.readouterr() == ("", "")
