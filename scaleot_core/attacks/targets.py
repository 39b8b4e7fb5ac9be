"""What is attacked: the package as it is, and, beside it, what it is compared with."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from scaleot_core.attacks.restoration import forget, widen
from scaleot_core.compression import emulator
from scaleot_core.compression.plan import Plan
from scaleot_core.exchange.package import Package
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.params import changed

Target = Callable[[], PreTrainedModel]


def targets(package: Package, owner: ModelOwner) -> dict[str, Target]:
    """Name the package and what `attack.references` lists, each loaded when its turn comes.

    `widened` is the package with what it can hold, `without_weights` the same shapes with all but the adapter layers
    drawn anew, and `uniform` another method's emulator of equal bytes, by the same owner.
    """
    params, device = owner.params, owner.runtime.device

    def shipped(change: Callable[[PreTrainedModel, Plan], None] | None = None) -> PreTrainedModel:
        model = package.load(device)
        if change:
            change(model, package.plan)
        return model

    def uniform() -> PreTrainedModel:
        other = replace(owner, params=changed(params, {"method": "uniform"}))
        made = METHODS["uniform"](other)
        return emulator.assemble(other.config, made.plan, made.tensors, device=device)

    beside: dict[str, Target] = {
        "widened": partial(shipped, widen),
        "without_weights": partial(shipped, partial(forget, seed=params.seed)),
        "uniform": uniform,
    }
    return {"package": shipped} | {name: beside[name] for name in params.attack.references}
