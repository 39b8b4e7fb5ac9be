"""Study harmonizers: ways to train them, and forms of them, by the perplexity of what they replace, at β = 0.

The layers replaced are those that α = 0.25, 0.5 and 0.75 take by the prior, the same for every variant. Each variant
and seed is kept when it is done, so that a stopped study goes on. `make harmonizer-studies` runs it.
"""

import copy
import math
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import cached_json, fingerprint, write_csv
from scaleot_core.common.progress import console
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression import dlr, layer_importance
from scaleot_core.compression.harmonizer import Harmonizers
from scaleot_core.compression.local_fit import fit_locally
from scaleot_core.compression.plan import choose_layers
from scaleot_core.models.forward import hidden_states, mean_loss, swapped_layers
from scaleot_core.models.loading import load_model
from scaleot_core.models.streaming import StreamedModel
from scaleot_core.params import Params, changed, load_params
from scaleot_core.training.checkpoint import scratch_dir

MODEL, CORPUS, PRIOR = Path("artifacts/model"), Path("artifacts/corpus"), Path("artifacts/importance/scores.json")
OUT = Path("docs/studies/harmonizers.csv")
SEEDS = (0, 1, 2)
ALPHAS = (0.25, 0.5, 0.75)
HELDOUT_BLOCKS = 16
SHORT = 100  # steps of the fits that compare forms
FITS, PAPER = {"dlr.steps": 0}, {"dlr.keep_threshold": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "layers dropped": {"layer_importance.steps": 0, **FITS},
    "ridge, rank 64": {"ridge": True},
    "local fits": FITS,
    "local fits, seconds of fits and DLR": {"layer_importance.steps": 800, **FITS},
    "DLR from zero, paper's draw, seconds of fits and DLR": {
        "dlr.init": "zero",
        "dlr.steps": 170,
        "dlr.lr": 1e-3,
        **PAPER,
    },
    "fits, then DLR, paper's draw": PAPER,
    "fits, then DLR, essential layers settled": {},
    "short fits": {"layer_importance.steps": SHORT, **FITS},
    "short fits, rank 16": {"layer_importance.steps": SHORT, "harmonizer.rank": 16, **FITS},
    "short fits, rank 256": {"layer_importance.steps": SHORT, "harmonizer.rank": 256, **FITS},
}
Trained = tuple[list[nn.Module], float, int]
"""Stand-ins for all layers, seconds to make them, and tokens that went through the model for it."""
FITTED: dict[str, tuple[Harmonizers, float]] = {}


class LinearMap(nn.Module):
    """x + right · left · x + bias, of the harmonizer's rank: what ridge regression gives in one closed form."""

    def __init__(self, before: Tensor, after: Tensor, rank: int, ridge: float = 1e-4) -> None:
        super().__init__()
        x, y = before.float(), (after.float() - before.float())
        weight = 1 / after.float().square().mean(1, keepdim=True)  # as the local fits weight tokens
        x1 = torch.cat([x, torch.ones(len(x), 1)], 1)
        gram = (x1.T @ (weight * x1)).double()
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        full = torch.linalg.solve(gram, (x1.T @ (weight * y)).double()).float()  # (D + 1, D)
        fitted = x1 @ full * weight.sqrt()
        basis = torch.linalg.eigh((fitted.T @ fitted).double()).eigenvectors[:, -rank:].float()  # (D, r)
        self.left, self.right, self.bias = full[:-1] @ basis, basis.T, full[-1] @ basis @ basis.T

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return x + (x.float() @ self.left @ self.right + self.bias).to(x.dtype)


def fitted(model: PreTrainedModel, blocks: Tensor, params: Params) -> tuple[Harmonizers, float]:
    """Locally fitted harmonizers and the seconds that they took; made once for all variants that start from them."""
    fits = params.layer_importance
    key = fingerprint(params.harmonizer.model_dump(), fits.model_dump(), params.seed)
    if key not in FITTED:
        harmonizers = layer_importance.new_harmonizers(model.config, params.harmonizer, params.seed).to(model.device)
        start = time.perf_counter()
        streamed = StreamedModel(MODEL, model.config, device=model.device, dtype=model.dtype)
        options = fits.model_dump(include={"steps", "batch_tokens", "lr"})
        fit_locally(streamed, harmonizers, blocks, **options, seed=params.seed)
        FITTED[key] = (harmonizers, time.perf_counter() - start)
    harmonizers, seconds = FITTED[key]
    return copy.deepcopy(harmonizers), seconds


def train(model: PreTrainedModel, blocks: Tensor, params: Params, prior: list[float]) -> Trained:
    """Harmonizers trained as the parameters say."""
    settings, seconds, tokens = params.dlr, 0.0, 0
    harmonizers = layer_importance.new_harmonizers(model.config, params.harmonizer, params.seed).to(model.device)
    if settings.init == "prior" and params.layer_importance.steps:
        local = blocks[: params.layer_importance.calibration_blocks]
        harmonizers, seconds = fitted(model, local, params)
        tokens += local.numel()
    if settings.steps:
        start, begun = torch.zeros(len(prior), dtype=torch.float64), time.perf_counter()
        if settings.init == "prior":
            start += torch.tensor(prior)
        dlr.train(model, harmonizers, start, blocks, settings, seed=params.seed)
        seconds += time.perf_counter() - begun
        networks = settings.steps + settings.steps // settings.score_interval * settings.candidates
        tokens += networks * settings.batch_blocks * blocks.shape[1]
    return list(harmonizers), seconds, tokens


def ridge(model: PreTrainedModel, blocks: Tensor, params: Params) -> Trained:
    """Linear maps of the harmonizers' rank, by ridge regression on the same hidden states."""
    local = blocks[: params.layer_importance.calibration_blocks]
    start = time.perf_counter()
    pairs = pairwise(hidden_states(model, local))
    maps: list[nn.Module] = [LinearMap(before, after, params.harmonizer.rank) for before, after in pairs]
    return maps, time.perf_counter() - start, local.numel()


def main() -> None:
    given = load_params()
    runtime = setup(given, "study harmonizers")
    model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
    blocks = read_tensors(CORPUS / "train.safetensors")["blocks"]
    heldout = read_tensors(CORPUS / "heldout.safetensors")["blocks"][:HELDOUT_BLOCKS]
    prior = layer_importance.read_scores(PRIOR, model.config.num_hidden_layers)
    chosen = {}
    for alpha in ALPHAS:
        kinds = choose_layers(prior, adapter_layers=given.adapter_layers, alpha=alpha, placement="importance")
        chosen[alpha] = [i for i, kind in enumerate(kinds) if kind == "harmonizer"]

    def measure(changes: dict[str, Any], seed: int) -> dict[str, float]:
        params = changed(given, {key: value for key, value in changes.items() if key != "ridge"} | {"seed": seed})
        found = ridge(model, blocks, params) if "ridge" in changes else train(model, blocks, params, prior)
        trained, seconds, tokens = found
        row = {"seconds": seconds, "tokens": tokens}
        for alpha, layers in chosen.items():
            with swapped_layers(model, {i: trained[i] for i in layers}):
                row[f"alpha={alpha}"] = math.exp(mean_loss(model, heldout))
        console.print(changes, row)
        return row

    key = fingerprint(given.model_dump(), HELDOUT_BLOCKS, MODEL, CORPUS, PRIOR)
    done = scratch_dir(f"study-harmonizers-{key}")
    rows = []
    for seed in SEEDS:
        for name, changes in VARIANTS.items():
            file = done / f"{fingerprint(changes, seed)}.json"
            rows.append({"variant": name, "seed": seed, **cached_json(file, partial(measure, changes, seed))})
    write_csv(OUT, rows)
    show(rows, math.exp(mean_loss(model, heldout)))


def show(rows: list[dict[str, Any]], whole: float) -> None:
    """Print the mean and standard error over seeds of every variant."""
    table = Table(title=f"perplexity of held-out text; the model has {whole:.1f}")
    for column in list(rows[0])[:1] + list(rows[0])[2:]:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name in VARIANTS:
        cells = []
        for column in list(rows[0])[2:]:
            values = [row[column] for row in rows if row["variant"] == name]
            error = statistics.stdev(values) / len(values) ** 0.5
            digits = 1 if column.startswith("alpha") else 0
            cells.append(f"{statistics.fmean(values):,.{digits}f}" + (f" ± {error:.1f}" if digits else ""))
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
