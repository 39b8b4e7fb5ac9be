"""GradOT: singular values of the attention and channels of the feed-forward part, kept by their effect on gradients.

Source: ACL 2025 (arXiv 2507.04455); there is no public code and its text was not at hand. After two secondary notes: a
change δ of a weight has the score ‖H δ‖₁ − λ · g ⊙ δ, with the Hessian H by K-FAC and the gradient g of the loss;
components whose removal scores least go; the largest 5 % of the singular values always stay; adapter layers at the
ends; no training. Assumed, where they are silent: next-token cross-entropy on the public corpus, empirical Fisher,
each component scored as if it went alone, products summed, every matrix cut by the same share, all of q, k, v and o
and of gate, up and down, λ = 1.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.compression.channels import prune_channels
from scaleot_core.compression.layer_choice import cut_ranks, end_layers
from scaleot_core.compression.low_rank import weight_of
from scaleot_core.compression.plan import ADAPTER, Layer, Plan, layers_of
from scaleot_core.compression.rank_compression import compress_layer
from scaleot_core.compression.svd import Factors, decompose
from scaleot_core.methods.base import BuiltEmulator, ModelOwner, largest_fitting
from scaleot_core.models.backward import BackwardPass
from scaleot_core.models.families import family, feed_forward_paths, fusion, projection_paths
from scaleot_core.models.forward import hooks, next_token_loss

ALWAYS = 0.05  # share of the singular values that stay whatever their score
CALIBRATION_BLOCKS = 32  # training blocks for gradients and the Hessian's factors
BATCH_BLOCKS = 4  # of the backward pass
LAMBDA = 1.0  # λ: how much a part counts whose loss would raise the emulator's own loss
STEPS = 1000  # of the share of parameters that is searched


@dataclass
class Statistics:
    """Of one linear map y = W x + b over the tokens: A = E[x xᵀ], G = E[g gᵀ] and the gradients E[g xᵀ], E[g]."""

    inputs: Tensor
    outputs: Tensor
    gradient: Tensor
    bias_gradient: Tensor

    def part(self, rows: Tensor) -> "Statistics":
        """Select the statistics of some rows of W."""
        return Statistics(self.inputs, self.outputs[rows][:, rows], self.gradient[rows], self.bias_gradient[rows])


@contextmanager
def statistics(modules: Mapping[str, nn.Module], tokens: int) -> Iterator[dict[str, Statistics]]:
    """Collect statistics of linear maps, by their names, from the backward pass in the block; empty until it ends.

    They are sums over all tokens, over the number of those that have a loss, `tokens`. g is the gradient of the sum of
    the token losses, so that all have one scale.
    """
    sums: dict[str, list[Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    by_name: dict[str, Statistics] = {}

    def before(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach().flatten(0, -2).float()

        return keep

    def add(name: str, gradient: Tensor) -> None:
        x, g = inputs.pop(name), gradient.flatten(0, -2).float()
        products = [x.T @ x, g.T @ g, g.T @ x, g.sum(0)]
        sums[name] = products if name not in sums else [a.add_(b) for a, b in zip(sums[name], products, strict=True)]

    def after(name: str) -> Callable[..., None]:
        def wait(
            module: nn.Module, args: object, out: Tensor
        ) -> None:  # a module's hook forbids Falcon to add in place
            out.register_hook(partial(add, name))

        return wait

    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    with hooks(*handles):
        yield by_name
    by_name |= {name: Statistics(*(total.div_(tokens) for total in sums.pop(name))) for name in list(sums)}


def component_scores(factors: Factors, of_map: Statistics) -> Tensor:
    """Score the cost of removing each singular component, from factors left (out, k) and right (k, in) of W: (k,)."""
    left, right = factors
    curvature = (of_map.outputs @ left).abs().sum(0) * (right @ of_map.inputs).abs().sum(1)
    return curvature + LAMBDA * torch.einsum("ok,oi,ki->k", left, of_map.gradient, right)


def channel_scores(into: list[tuple[Tensor, Tensor | None, Statistics]], out: tuple[Tensor, Statistics]) -> Tensor:
    """Score the cost of removing each channel: (f,). `into` are matrices (f, D) with biases (f,); `out` is (D, f)."""
    total = torch.zeros(len(into[0][0]), device=into[0][0].device)
    for matrix, bias, of_map in into:
        total += of_map.outputs.abs().sum(0) * (matrix @ of_map.inputs).abs().sum(1)
        total += LAMBDA * (of_map.gradient * matrix).sum(1)
        if bias is not None:
            total += LAMBDA * of_map.bias_gradient * bias
    matrix, of_map = out
    total += (of_map.outputs @ matrix).abs().sum(0) * of_map.inputs.abs().sum(0)
    return total + LAMBDA * (of_map.gradient * matrix).sum(0)


def in_order(scores: Tensor) -> Tensor:
    """Order components from the one that stays longest: the largest singular values, then by falling score."""
    first = max(1, -(-len(scores) * int(ALWAYS * 100) // 100))
    return torch.cat([torch.arange(first), first + scores[first:].cpu().argsort(descending=True, stable=True)])


def plan(owner: ModelOwner) -> Plan:
    """Plan adapter layers at the ends, and of every matrix between them the largest share that fits the budget."""
    shapes = owner.shapes
    adapters = end_layers(shapes.layers, owner.params.adapter_layers)

    def keeping(size: int) -> Plan:
        share = size / STEPS
        ranks = {
            name: tuple(max(1, int(share * out * into / (out + into))) for out, into in matrices)
            for name, matrices in shapes.projections.items()
        }
        channels = max(1, round(share * shapes.channels))
        cut = Layer(kind="compressed", ranks=cut_ranks(ranks, shapes), channels=channels)
        return tuple(ADAPTER if i in adapters else cut for i in range(shapes.layers))

    return largest_fitting(owner, range(1, STEPS + 1), keeping)


def build(owner: ModelOwner) -> BuiltEmulator:
    """Build the emulator layer by layer, the last one first: components and channels are removed by their scores."""
    layer_plan, channels = plan(owner), dict[int, Tensor]()
    return BuiltEmulator(layer_plan, layer_by_layer(owner, layer_plan, channels), channels)


def layer_by_layer(owner: ModelOwner, plan: Plan, channels: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the emulator's tensors by their names, and put into `channels` those that each layer keeps.

    In memory are one of the model's layers with its statistics, and all layers' inputs on the calibration blocks.
    """
    streamed, blocks = owner.stream(), owner.blocks[:CALIBRATION_BLOCKS]
    yield from streamed.tensors(streamed.outside)
    backward = BackwardPass(streamed, blocks, partial(next_token_loss, reduction="sum"), BATCH_BLOCKS)
    lowest = min(layers_of(plan, "compressed"))
    for i in reversed(range(len(plan))):
        with streamed.layer(i) as layer:
            if plan[i].kind == "compressed":
                modules = {name: streamed.model.get_submodule(name) for name in linear_maps(owner.config, i)}
                with statistics(modules, blocks[:, 1:].numel()) as by_name:
                    backward.through(i, layer)
                channels[i] = cut_layer(streamed.model, i, plan[i], by_name)
            elif i > lowest:  # nobody needs the gradient below
                backward.through(i, layer)
            yield from streamed.layer_tensors(i, layer)


def linear_maps(config: PretrainedConfig, index: int) -> list[str]:
    """Name the linear maps of a layer that are cut, as in the model."""
    paths = projection_paths(config) + feed_forward_paths(config)
    return [f"{family(config).layers}.{index}.{path}" for path in paths]


def cut_layer(model: PreTrainedModel, index: int, planned: Layer, by_name: Mapping[str, Statistics]) -> Tensor:
    """Cut one layer in place by its statistics; return the feed-forward channels that it keeps, ascending."""
    config, names = model.config, family(model.config)
    prefix = f"{names.layers}.{index}."

    def factors(name: str, part: int, weight: Tensor) -> Factors:
        left, right = decompose(weight)
        projection = weight_of(model.get_submodule(name))[0]
        rows = fusion(config, name.rpartition(".")[2]).rows(len(projection))[part].to(weight.device)
        order = in_order(component_scores((left, right), by_name[name].part(rows))).to(weight.device)
        return left[:, order], right[order]

    def matrices(name: str, fused: int) -> list[tuple[Tensor, Tensor | None, Statistics]]:
        weight, bias = weight_of(model.get_submodule(f"{prefix}{name}"))
        return [
            (weight[rows].float(), None if bias is None else bias[rows].float(), by_name[f"{prefix}{name}"].part(rows))
            for rows in torch.arange(len(weight), device=weight.device).chunk(fused)
        ]

    [(out, _, out_statistics)] = matrices(names.feed_forward_out, 1)
    into = [matrix for name, fused in names.feed_forward_in.items() for matrix in matrices(name, fused)]
    scores = channel_scores(into, (out, out_statistics))
    kept = scores.cpu().argsort(descending=True, stable=True)[: planned.channels].sort().values
    compress_layer(model, index, ranks=planned.ranks, decompose=factors)
    prune_channels(model, index, kept)
    return kept
