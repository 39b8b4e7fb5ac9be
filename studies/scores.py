"""Study scores: how well each estimator ranks layers, and sets of a quarter of them, by what replacing them costs.

Ground truth is measured with the harmonizers of `train_harmonizers`, on held-out text that no estimator has seen. An
estimator says of a set the sum over its layers: of scores, and, where it has costs in nats, of those; scores that began
at the prior are turned back into costs as the prior was made of them. Each finished part is kept, so that a stopped
study goes on. `make harmonizer-studies` runs it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import cached_json, fingerprint, read_json, write_csv
from scaleot_core.common.progress import console, progress
from scaleot_core.common.random import generator
from scaleot_core.common.runtime import setup
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression import dlr, layer_importance
from scaleot_core.compression.harmonizer import Harmonizers
from scaleot_core.models.forward import mean_loss, swapped_layers
from scaleot_core.models.loading import load_model
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import scratch_dir

MODEL, CORPUS = Path("artifacts/model"), Path("artifacts/corpus")
PRIOR, HARMONIZERS = Path("artifacts/importance"), Path("artifacts/harmonizers")
OUT = Path("docs/studies/scores.csv")
SETS, BLOCKS = 200, 4
STEPS = 100  # of DLR from zero, with a score update at every one


def true_costs(model: PreTrainedModel, harmonizers: Harmonizers, sets: list[list[int]], blocks: Tensor) -> list[float]:
    """The loss (nats) that replacing each set of layers costs on the blocks."""
    whole = mean_loss(model, blocks)
    costs = []
    with progress("true costs", len(sets)) as tick:
        for layers in sets:
            with swapped_layers(model, {i: harmonizers[i] for i in layers}):
                costs.append(mean_loss(model, blocks) - whole)
            tick(tokens=blocks.numel(), loss=costs[-1])
    return costs


def main() -> None:
    params = load_params()
    runtime = setup(params, "study scores")
    model = load_model(MODEL, device=runtime.device, dtype=runtime.dtype)
    layers = model.config.num_hidden_layers
    blocks = read_tensors(CORPUS / "train.safetensors")["blocks"]
    heldout = read_tensors(CORPUS / "heldout.safetensors")["blocks"][:BLOCKS]
    probe = blocks[-params.layer_importance.sensitivity_blocks :]
    done = scratch_dir(f"study-scores-{fingerprint(params.model_dump(), MODEL, CORPUS, HARMONIZERS)}")

    def fitted(folder: Path) -> Harmonizers:
        harmonizers = layer_importance.new_harmonizers(model.config, params.harmonizer, params.seed).to(model.device)
        layer_importance.restore(harmonizers, folder / "harmonizers.safetensors")
        return harmonizers

    draw, size = generator(params.seed, "sets"), layers // 4
    sets = [torch.randperm(layers, generator=draw)[:size].tolist() for _ in range(SETS)]
    final = fitted(HARMONIZERS)
    truth = cached_json(done / "sets.json", partial(true_costs, model, final, sets, heldout))
    alone = cached_json(done / "alone.json", partial(true_costs, model, final, [[i] for i in range(layers)], heldout))

    ways: dict[str, dict[str, Any]] = {
        "DLR from zero": {"score_lr": 10.0},
        "DLR from zero, η = 300": {"score_lr": 300.0},
        "DLR from zero, η = 300, one group": {"score_lr": 300.0, "group_size": layers},
    }

    def learned(changes: dict[str, Any]) -> list[float]:
        settings = params.dlr.model_copy(update={**changes, "steps": STEPS, "score_interval": 1, "keep_threshold": 1.0})
        start = torch.zeros(layers, dtype=torch.float64)
        return dlr.train(model, fitted(PRIOR), start, blocks, settings, seed=params.seed)[0].tolist()

    network, updates = params.dlr.batch_blocks * blocks.shape[1], params.dlr.steps // params.dlr.score_interval
    spent = {"sensitivity": probe.numel() * (layers + 1), "block_influence": probe.numel(), "taylor": 3 * probe.numel()}
    rows = []

    def row(name: str, scores: list[float], tokens: int, costs: list[float] | None = None) -> None:
        def rank(values: list[float], truth: list[float], sets: list[list[int]]) -> float:
            said = [sum(values[i] for i in layers) for layers in sets]
            return float(spearmanr(said, truth).statistic) if len(set(said)) > 1 else math.nan  # it tells none apart

        single = rank(scores, alone, [[i] for i in range(layers)])
        by_cost = "" if costs is None else rank(costs, truth, sets)
        found = {"layers": single, "sets": rank(scores, truth, sets), "sets by cost": by_cost}
        rows.append({"estimator": name, "tokens": tokens, **found})

    for name in spent:
        costs = cached_json(
            done / f"{name}.json", partial(layer_importance.estimate, name, model, fitted(PRIOR), probe)
        )
        row(name, layer_importance.prior_scores(costs), spent[name], costs)
    tokens = spent["sensitivity"] + network * (3 * params.dlr.steps + updates * params.dlr.candidates)
    scores = torch.tensor(read_json(HARMONIZERS / "scores.json")["scores"], dtype=torch.float64)
    logs = torch.tensor(read_json(PRIOR / "scores.json")["costs"], dtype=torch.float64).clamp(min=1e-6).log()
    row("DLR from the prior", scores.tolist(), tokens, (scores / 2 * logs.std() + logs.mean()).exp().tolist())
    for name, changes in ways.items():
        scores = cached_json(done / f"{fingerprint(changes)}.json", partial(learned, changes))
        row(name, scores, network * STEPS * (3 + params.dlr.candidates))
    row("true cost of each layer alone", layer_importance.prior_scores(alone), heldout.numel() * layers, alone)
    row("random", torch.rand(layers, generator=draw).tolist(), 0)

    write_csv(OUT, rows)
    table = Table(*rows[0], title=f"Spearman with the true loss increase: {layers} layers alone, {SETS} sets of {size}")
    for found in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in found.values()))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
