"""Layer importance: what losing each decoder layer to its harmonizer costs, and scores of it (method section 2).

The prior that Dynamic LayerReplace starts from, and the other estimators that stand beside it to compare.
"""

import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common.errors import UserError
from scaleot_core.common.files import atomic_folder, read_json, write_json
from scaleot_core.common.progress import progress
from scaleot_core.common.random import generator
from scaleot_core.common.tensors import read_tensors
from scaleot_core.compression.harmonizer import Harmonizer, Harmonizers
from scaleot_core.models.families import family
from scaleot_core.models.forward import hidden_states, mean_loss, restarted

SCORED_METHODS = frozenset({"scaleot"})
"""Those that choose layers by scores and put harmonizers in their place; the others need neither."""


def new_harmonizers(config: PretrainedConfig, rank: int, seed: int) -> Harmonizers:
    """Make one fresh float32 harmonizer per decoder layer."""
    draw = generator(seed, "harmonizers")
    harmonizers = Harmonizers()
    for _ in range(config.num_hidden_layers):
        harmonizer = Harmonizer(config.hidden_size, rank, in_tuple=family(config).in_tuple)
        harmonizer.reset(draw)
        harmonizers.append(harmonizer)
    return harmonizers


def write_not_needed(folder: Path, method: str) -> None:
    """Write the artifact of a stage that makes scores and harmonizers where the method needs neither."""
    with atomic_folder(folder) as out:
        write_json(out / "scores.json", {"not_needed_by": method, "prior": [], "scores": []})
        write_json(out / "history.json", [])


def read_scores(path: Path, layers: int) -> list[float]:
    """Read the scores of a model's decoder layers; UserError where one is missing or not finite."""
    scores = read_json(path).get("scores", [])
    if not scores:
        raise UserError(f"{path}: it was made for a method that needs no scores; run `dvc repro` with method = scaleot")
    if len(scores) != layers:
        raise UserError(f"{path}: {len(scores)} scores, and the model has {layers} decoder layers; make it again")
    for i, score in enumerate(scores):
        if type(score) not in (int, float) or not math.isfinite(score):
            raise UserError(f"{path}: layer {i} has score {score}; make it again")
    return scores


def restore(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Load fitted harmonizers, or with the prefix `3.` layer 3's alone, into a module of any dtype.

    UserError names the first tensor that another model or rank would have.
    """
    tensors = read_tensors(path, prefix)
    expected = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        parameter, stored = expected.get(name), tensors.get(name)
        if parameter is None or stored is None or parameter.shape != stored.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (stored, parameter)]
            raise UserError(
                f"{path}: tensor {name!r} is {shapes[0]} there and {shapes[1]} in this model; "
                "these harmonizers are another model's or of another rank: run layer_importance again"
            )
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


@torch.no_grad()
def sensitivity(model: PreTrainedModel, harmonizers: Harmonizers, blocks: Tensor, batch_blocks: int = 8) -> list[float]:
    """Measure the loss (nats) that replacing one layer alone by its harmonizer costs, for every layer, on `blocks`.

    The layers before it run once for all: what comes of layer i's harmonizer on its known input is put in its place.
    """
    model_loss = mean_loss(model, blocks, batch_blocks)
    costs = [0.0] * len(harmonizers)
    with progress("sensitivity", len(harmonizers) * math.ceil(len(blocks) / batch_blocks)) as tick:
        for batch in blocks.split(batch_blocks):
            inputs = hidden_states(model, batch, batch_blocks)
            for i, harmonizer in enumerate(harmonizers):
                replaced = harmonizer.replacement(inputs[i].unflatten(0, batch.shape))
                with restarted(model, i, replaced):
                    loss = mean_loss(model, batch, batch_blocks)
                costs[i] += (loss - model_loss) * len(batch) / len(blocks)
                tick(tokens=batch.numel(), loss=loss - model_loss)
    return costs


@torch.no_grad()
def block_influence(model: PreTrainedModel, blocks: Tensor) -> list[float]:
    """Average 1 − cosine of a layer's input and output over tokens (ShortGPT, Men et al. 2024, equation 1)."""
    states = hidden_states(model, blocks)
    pairs = pairwise(states)
    return [1 - nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).mean().item() for a, b in pairs]


def estimate(name: str, model: PreTrainedModel, harmonizers: Harmonizers, blocks: Tensor) -> list[float]:
    """Estimate every layer's cost by the named estimator, one of `layer_importance.estimator`."""
    if name == "sensitivity":
        return sensitivity(model, harmonizers, blocks)
    return block_influence(model, blocks)


def prior_scores(costs: list[float]) -> list[float]:
    """Turn an estimator's costs into scores: their logarithms, standardised to mean 0 and standard deviation 2.

    Costs span orders of magnitude, and s_i is a log-odds (p_i = sigmoid(s_i)), so the logarithm is its natural
    scale; the spread lets p reach from about 0.02 to 0.98. A cost at or below zero counts as the least positive one.
    """
    values = torch.tensor(costs, dtype=torch.float64)
    positive = values[values > 0]
    if len(positive) == 0:
        return [0.0] * len(costs)
    logs = values.clamp(min=positive.min()).log()
    if bool((logs == logs[0]).all()):
        return [0.0] * len(costs)
    return ((logs - logs.mean()) / logs.std() * 2).tolist()
