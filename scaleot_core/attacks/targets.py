"""What is attacked and how: the package by three attackers, and, beside it, what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from scaleot_core.attacks.hidden import cut_parameters
from scaleot_core.attacks.restoration import forget, imitation_loss, widen
from scaleot_core.attacks.several import graft, unite
from scaleot_core.common.progress import say
from scaleot_core.compression import emulator
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange.package import Package
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.forward import next_token_loss
from scaleot_core.models.loading import load_model
from scaleot_core.params import changed

Loss = Callable[[Tensor], Tensor]
Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Target:
    """A model that is attacked: how it is loaded, once its turn comes, and what its attacker trains by which loss."""

    load: Callable[[], PreTrainedModel]
    parameters: Callable[[PreTrainedModel], Parameters] = lambda model: dict(model.named_parameters())
    loss: Callable[[PreTrainedModel], Loss] = lambda model: partial(next_token_loss, model)


def targets(package: Package, owner: ModelOwner, served: Callable[[], PreTrainedModel]) -> dict[str, Target]:
    """Name the package, attacked in every way of `attack.attackers`, and what `attack.references` lists.

    `package` is the attacker who trains everything in it, `cut_only` the one who trains only what stands for what was
    cut, as the attack on closed layers of SCARA does (Huang et al. 2024), and `queries` the one whose labels are the
    outputs of the model that `served` loads, as in model extraction (Tramèr et al. 2016; Krishna et al. 2020).
    References are attacked as `package` is: `model` is the real model, which gains by such text too, `widened` the
    package at full capacity, `without_weights` the same shapes with all but the adapter layers drawn anew, `uniform`
    another method's emulator of equal bytes, by the same owner. `collusion` starts from the packages of `attack.beside`
    too, put together, and `sibling` from the public model `attack.sibling` with the package in it, where these are
    named. `cut_only` is left out where the package has nothing in the place of what was cut.
    """
    params, device = owner.params, owner.runtime.device

    def shipped(change: Callable[[PreTrainedModel, Plan], None] | None = None) -> PreTrainedModel:
        model = package.load(device)
        if change:
            change(model, package.plan)
        return model

    def uniform() -> PreTrainedModel:
        other = replace(owner, params=changed(params, {"method": "uniform"}))
        small = METHODS["uniform"](other)
        return emulator.assemble(other.config, small.plan, small.tensors, device=device)

    def of_cut(model: PreTrainedModel) -> Parameters:
        return cut_parameters(owner.outline, model, package.plan)

    def by_queries(model: PreTrainedModel) -> Loss:
        return partial(imitation_loss, model, served())

    def collusion() -> PreTrainedModel:
        packages = [package, *(Package(Path(folder)) for folder in params.attack.beside)]
        return unite([(one.load(device), one.plan) for one in packages], owner.shapes.channels, params.seed)

    def sibling() -> PreTrainedModel:
        model = load_model(Path(params.attack.sibling), device=device, dtype=owner.runtime.dtype)
        return graft(model, package.load(device), package.plan)

    others: dict[str, Target] = {
        "collusion": Target(collusion),
        "sibling": Target(sibling),
        "cut_only": Target(shipped, parameters=of_cut),
        "queries": Target(shipped, loss=by_queries),
        "model": Target(owner.load),
        "widened": Target(partial(shipped, widen)),
        "without_weights": Target(partial(shipped, partial(forget, seed=params.seed))),
        "uniform": Target(uniform),
    }
    names: list[str] = [*params.attack.attackers, *params.attack.references]
    names += ["collusion"] * bool(params.attack.beside) + ["sibling"] * bool(params.attack.sibling)
    if "cut_only" in names and not of_cut(package.meta_model):
        say("cut_only: the package has nothing in the place of what was cut; this attacker is left out")
        names.remove("cut_only")
    return {"package": Target(shipped)} | {name: others[name] for name in names}
