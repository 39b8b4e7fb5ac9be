"""Leaks: whom `scaleot trace` names, and how clearly, after what may be done to a marked package.

The emulator of the present parameters is marked for five recipients. The score of those whose package is in a leak, the
least of them, and the largest of 100 innocents: `python -m studies.leaks`, after `make repro`; minutes on 2 cores, most
of them for the attack's training.
"""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.artifacts import Artifacts
from scaleot_core.attacks.restoration import restore
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.progress import console
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression.emulator import PARTS, assemble
from scaleot_core.compression.quantization import quantize
from scaleot_core.exchange.ledger import read_exact
from scaleot_core.exchange.package import Package
from scaleot_core.exchange.watermark import Weights, marked, recipient_key, scores, threshold
from scaleot_core.models.forward import mean_loss
from scaleot_core.params import load_params
from scaleot_core.settings import Quantization
from scaleot_core.training.checkpoint import Checkpoint

RECIPIENTS, INNOCENTS = 5, 100
SECRET = "5c" * 32  # of no package that is shipped
Leak = dict[str, Tensor]


def quantized(leak: Mapping[str, Tensor], form: Quantization, names: list[str]) -> Leak:
    """Round the marked matrices of a leak to 8 or 4 bits."""
    return {name: quantize(t, form).dequantized() if name in names else t for name, t in leak.items()}


def average(leaks: list[Leak]) -> Leak:
    """Average leaks weight by weight."""
    return {name: torch.stack([leak[name].float() for leak in leaks]).mean(0) for name in leaks[0]}


def main() -> None:
    params, artifacts = load_params(), Artifacts()
    runtime, package = setup(params, "leaks"), Package(artifacts.emulator, links=True)
    exact = read_exact(artifacts.emulator_private)[package.sha256]
    keys = [recipient_key(SECRET, str(k)) for k in range(RECIPIENTS + INNOCENTS)]
    plain, names = dict(package.stream(*PARTS)), list[str]()
    copies = [dict(marked(plain.items(), key, exact, [])) for key in keys[:RECIPIENTS]]
    list(marked(plain.items(), keys[0], exact, names))
    blocks, heldout = artifacts.blocks("train"), artifacts.blocks("heldout")

    def model(leak: Leak) -> PreTrainedModel:
        tensors = ((name, tensor.clone()) for name, tensor in leak.items())  # training moves them
        return assemble(package.config, package.plan, tensors, device=runtime.device)

    def trained(leak: Leak) -> Leak:
        """Run the restoration attack on a leak."""
        victim = model(leak)
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Checkpoint(Path(scratch), params.checkpoint_seconds)
            restore(victim, blocks, heldout, params.attack, seed=params.seed, label="leaks", checkpoint=checkpoint)
        return {name: tensor.detach() for name, tensor in victim.state_dict().items() if name in leak}

    five = average(copies)
    leaks: dict[str, tuple[int, Callable[[], Leak]]] = {  # how many recipients' packages are in it
        "as it was shipped": (1, lambda: copies[0]),
        "int8": (1, partial(quantized, copies[0], "int8", names)),
        "int4": (1, partial(quantized, copies[0], "int4", names)),
        f"average of {RECIPIENTS}": (RECIPIENTS, lambda: five),
        f"average of {RECIPIENTS}, int4": (RECIPIENTS, partial(quantized, five, "int4", names)),
        "unmarked": (0, lambda: plain),
        "unmarked, int4": (0, partial(quantized, plain, "int4", names)),
        "after the attack": (1, partial(trained, copies[0])),
        "unmarked, after the attack": (0, partial(trained, plain)),
    }
    table = Table("leak", "least of its recipients", "largest of the others", "falsely named", title="Scores")
    for label, (count, make) in leaks.items():
        with tempfile.TemporaryDirectory() as folder:
            write_tensors(Path(folder) / "leak.safetensors", make())
            by_key = scores(Weights(Path(folder)), Weights(package.folder), package.config, names, keys)
        others = by_key[count:]
        accused = sum(score >= threshold(1) for score in others)
        table.add_row(label, f"{min(by_key[:count]):.1f}" if count else "", f"{max(others):.1f}", str(accused))
    losses = [mean_loss(model(leak), heldout) for leak in (plain, *copies)]
    console.print(
        table, f"threshold: {threshold(1):.2f} for one recipient, {threshold(RECIPIENTS):.2f} for {RECIPIENTS}"
    )
    console.print(f"held-out loss: {losses[0]:.4f}, marked {min(losses[1:]):.4f} to {max(losses[1:]):.4f}")


if __name__ == "__main__":
    run_command(main)
