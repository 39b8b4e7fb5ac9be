"""The optimizer and the loop: masters, the step limit, NaN, interruptions, and resuming to the same bytes."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from helpers import VOCABULARY, fill_disk, refusal, tiny_model
from torch import Tensor, nn

from scaleot_core.common.errors import UserError
from scaleot_core.common.random import generator
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import next_token_loss
from scaleot_core.training import loop
from scaleot_core.training.checkpoint import Checkpoint, scratch_dir
from scaleot_core.training.loop import run_steps
from scaleot_core.training.optimizer import Optimizer, linear_warmup_decay

STEPS = 6
DTYPES = [torch.bfloat16, torch.float32]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def power_cut() -> NoReturn:
    raise RuntimeError("power cut")


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    """Two parameters that get gradients, and one that never does."""
    draw = generator(seed, "parameters")
    return {name: nn.Parameter(torch.randn(4, 3, generator=draw).to(dtype)) for name in ("a", "b", "idle")}


def give_gradients(given: dict[str, nn.Parameter], i: int, *names: str) -> None:
    for name in names or ("a", "b"):
        p = given[name]
        p.grad = torch.randn(p.shape, generator=generator(0, "gradient", name, i)).to(p.dtype)


def copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """The same names, dtypes and bits."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


class Training:
    """A real training, of one decoder layer of a tiny model, as a fresh process starts it."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = tiny_model("llama").to(dtype)
        self.trained = dict(decoder_layers(self.model)[1].requires_grad_(True).named_parameters())
        self.optimizer = Optimizer(self.trained, weight_decay=0.01)
        self.began: list[int] = []
        self.finished: list[int] = []

    def step(self, i: int) -> dict[str, float]:
        self.began.append(i)
        blocks = torch.randint(VOCABULARY, (2, 8), generator=generator(0, "blocks", i))
        loss = next_token_loss(self.model, blocks)
        loss.backward()
        self.interrupt(i)
        self.optimizer.step(1e-2 * linear_warmup_decay(i, STEPS, 0.3))
        self.finished.append(i)
        return {"loss": loss.item(), "tokens": blocks.numel()}

    def interrupt(self, i: int) -> None:
        """What goes wrong in the middle of a step: nothing here."""

    def run(self, checkpoint: Checkpoint | None = None) -> list[dict[str, float]]:
        return run_steps(self.step, self.optimizer, label="here", steps=STEPS, checkpoint=checkpoint)

    def ends_like(self, other: "Training") -> bool:
        return equal(self.trained, other.trained) and equal(self.optimizer.tensors(), other.optimizer.tensors())


def test_bf16_parameters_follow_float32_masters() -> None:
    """Steps too small for bf16 add up."""
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": p})
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step(1e-4)
    assert optimizer.masters["w"].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters["w"].data, torch.full((5,), 1 - 50e-4))
    assert torch.equal(p, optimizer.masters["w"].bfloat16()) and bool((p < 1).all())


def test_float32_parameter_is_its_own_master() -> None:
    given = parameters(torch.float32)
    optimizer = Optimizer(given)
    assert all(optimizer.masters[name] is p for name, p in given.items())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        Optimizer({})


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_without_gradient_do_not_move(dtype: torch.dtype) -> None:
    """Neither by momentum nor by weight decay; and no gradient is left for the next step."""
    given = parameters(dtype)
    optimizer = Optimizer(given, weight_decay=0.5)
    give_gradients(given, 0)
    optimizer.step(0.1)
    before, state = copies(given), copies(optimizer.tensors())
    give_gradients(given, 1, "a")
    optimizer.step(0.1)
    assert not torch.equal(before["a"], given["a"])
    after = optimizer.tensors()
    assert torch.equal(before["b"], given["b"]) and torch.equal(before["idle"], given["idle"])
    assert all(torch.equal(state[key], after[key]) for key in state if key.endswith(("/b", "/idle")))
    assert all(p.grad is None for p in given.values())


def test_gradients_are_clipped_by_their_common_norm() -> None:
    given = parameters(torch.bfloat16)
    optimizer = Optimizer(given, clip=0.25)
    give_gradients(given, 0)
    optimizer.step(0.1)
    first_moments = [t for name, t in optimizer.tensors().items() if name.startswith("exp_avg/")]
    norm = torch.cat([t.flatten() for t in first_moments]).norm() / 0.1  # after one step: (1 − 0.9) · gradient
    assert norm.item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_optimizer_read_back_goes_on_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    given = parameters(dtype)
    optimizer = Optimizer(given, weight_decay=0.1)
    for i in range(3):
        give_gradients(given, i)
        optimizer.step(0.01)
    write_tensors(tmp_path / "state", optimizer.tensors())
    others = parameters(dtype, seed=1)
    other = Optimizer(others, weight_decay=0.1)
    other.load(read_tensors(tmp_path / "state"))
    assert equal(given, others)
    for i in range(3, 6):
        for each, its in ((given, optimizer), (others, other)):
            give_gradients(each, i, "a", "b", "idle")  # the idle one's moments begin here
            its.step(0.01)
    assert equal(given, others) and equal(optimizer.tensors(), other.tensors())


@pytest.mark.parametrize(
    ("steps", "warmup", "rise"), [(100, 0.1, 10), (10, 0.25, 2), (7, 0.5, 4), (5, 0, 1), (5, 1, 5)]
)
def test_warmup_then_linear(steps: int, warmup: float, rise: int) -> None:
    shares = [linear_warmup_decay(i, steps, warmup) for i in range(steps + 1)]
    assert shares[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    falling = steps - rise + 1
    assert shares[rise - 1 :] == pytest.approx([1 - i / falling for i in range(falling + 1)])
    assert min(shares[:-1]) > 0 and shares[-1] == 0  # no step of the run is without effect


@pytest.mark.parametrize("warmup", [0, 0.1, 1])
def test_a_single_step_is_taken_at_the_peak(warmup: float) -> None:
    assert linear_warmup_decay(0, 1, warmup) == 1


def test_stops_at_the_step_limit() -> None:
    run = Training()
    history = run.run()
    assert run.finished == list(range(STEPS))
    assert [row["step"] for row in history] == list(range(STEPS))
    assert all(row.keys() == {"step", "loss"} for row in history)


def test_without_a_checkpoint_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Training().run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_run(tmp_path: Path, loss: float) -> None:
    """The line names the step; the checkpoint stays that of the step before."""
    run, seen = Training(), []

    def step(i: int) -> dict[str, float]:
        seen.append(i)
        return {**run.step(i), **({"loss": loss} if i == 3 else {})}

    with pytest.raises(UserError) as caught:
        run_steps(step, run.optimizer, label="here", steps=STEPS, checkpoint=Checkpoint(tmp_path / "c", 0))
    assert str(caught.value).startswith(f"here: the loss is {loss} at step 3; ") and "\n" not in str(caught.value)
    assert seen == [0, 1, 2, 3]
    assert Checkpoint(tmp_path / "c", 0).resume(Training().optimizer) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stops", [[0], [1], [3], [STEPS - 1], [2, 4]], ids=str)
def test_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stops: list[int]
) -> None:
    whole = Training(dtype)
    history = whole.run()

    for stop in stops:
        run = Training(dtype)
        monkeypatch.setattr(run, "interrupt", lambda i, stop=stop: power_cut() if i == stop else None)
        with pytest.raises(RuntimeError, match="power cut"):
            run.run(Checkpoint(tmp_path / "c", 0))
    last = Training(dtype)
    assert last.run(Checkpoint(tmp_path / "c", 0)) == history
    assert last.finished == list(range(stops[-1], STEPS))
    assert last.ends_like(whole)


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    """It may die between its last step and its outputs."""
    first, again = Training(), Training()
    history = first.run(Checkpoint(tmp_path / "c", 0))
    assert again.run(Checkpoint(tmp_path / "c", 0)) == history
    assert not again.began and again.ends_like(first)


def test_removed_checkpoint_is_forgotten(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c", 0)
    checkpoint.remove()  # there is none yet
    Training().run(checkpoint)
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_saves_whenever_its_seconds_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, saved = Training(), []
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 10.0 * len(run.finished)))  # 10 s a step
    monkeypatch.setattr(Checkpoint, "save", lambda checkpoint, state, step: saved.append(step))
    run.run(Checkpoint(tmp_path / "c", 20))
    assert saved == [2, 4, 6]


def test_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run, last = Training(), Training(), Training()
    history = whole.run()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(run, "interrupt", lambda i: fill_disk(patch) if i == 3 else None)
        run.run(Checkpoint(tmp_path / "c", 0))
    assert run.finished == [0, 1, 2, 3]
    assert last.run(Checkpoint(tmp_path / "c", 0)) == history
    assert last.finished == [3, 4, 5] and last.ends_like(whole)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    Training().run(Checkpoint(tmp_path / "c", 0))
    (state,) = (tmp_path / "c").glob("steps/*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    assert str(state) in refusal(Training().run, Checkpoint(tmp_path / "c", 0))


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_lets_the_step_end_saves_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole, run, last = Training(), Training(), Training()
    history = whole.run()
    monkeypatch.setattr(run, "interrupt", lambda i: os.kill(os.getpid(), number) if i == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        run.run(Checkpoint(tmp_path / "c", 3600))  # long before the next checkpoint is due
    assert run.began == run.finished == [0, 1, 2]
    assert last.run(Checkpoint(tmp_path / "c", 3600)) == history
    assert last.finished == [3, 4, 5] and last.ends_like(whole)


def test_signal_without_a_checkpoint_stops_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Training()
    monkeypatch.setattr(run, "interrupt", lambda i: os.kill(os.getpid(), signal.SIGINT) if i == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.finished == [0, 1, 2] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["well", "failed", "interrupted"])
def test_signals_are_the_process_own_again(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    before, run, during = [signal.getsignal(number) for number in SIGNALS], Training(), []

    def interrupt(i: int) -> None:
        during.append([signal.getsignal(number) for number in SIGNALS])
        if i == 2 and ending == "failed":
            power_cut()
        if i == 2 and ending == "interrupted":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "interrupt", interrupt)
    with nullcontext() if ending == "well" else pytest.raises((RuntimeError, KeyboardInterrupt)):
        run.run()
    assert before not in during
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("root", [None, "/main/repository"])
def test_scratch_lies_in_the_main_repository(monkeypatch: pytest.MonkeyPatch, root: str | None) -> None:
    """Where experiments run in copies, DVC_ROOT is still the repository that they came from."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    if root:
        monkeypatch.setenv("DVC_ROOT", root)
    assert scratch_dir("tuning-1") == Path(root or ".") / ".scaleot" / "scratch" / "tuning-1"
