"""ScaleOT: harmonizers for the layers of least importance, Selective Rank Compression of the others (method 1 to 4)."""

from scaleot_core import decomposition, dlr, emulator, importance
from scaleot_core.files import fingerprint, read_tensors, tensor_hash, write_tensors
from scaleot_core.methods.budget import Owner, largest
from scaleot_core.params import changed
from scaleot_core.plan import Plan, plan_for
from scaleot_core.progress import say


def plan(owner: Owner) -> Plan:
    """What α and β make of the layers; with a `budget` the least α that keeps to it."""
    params, scores = owner.params, owner.scores()
    if not params.budget:
        return plan_for(params, scores)
    others = len(scores) - params.adapter_layers

    def keeping(kept: int) -> Plan:
        return plan_for(changed(params, {"alpha": (others - kept) / others}), scores)

    return keeping(largest(owner, range(0, others + 1), keeping))


def make(owner: Owner) -> Plan:
    """Turn the model into ScaleOT's emulator. With `dlr.after_src` the harmonizers are trained once more in it."""
    params, model = owner.params, owner.model
    harmonizers = importance.new_harmonizers(model, params.harmonizer, params.seed)
    importance.restore(harmonizers, owner.harmonizers / "harmonizers.safetensors")
    made = plan(owner)
    if not made.layers("compressed"):
        say(f"alpha = {params.alpha} leaves no layer to compress, so beta = {params.beta} does nothing", "yellow")
    covariances = None
    if params.src.whiten:
        blocks = owner.blocks[: params.src.calibration_blocks]
        weights = [tensor_hash(p) for p in model.parameters()]
        file = owner.scratch / f"inputs-{fingerprint(weights, tensor_hash(blocks))}.safetensors"
        if not file.exists():
            write_tensors(file, decomposition.input_covariances(model, blocks))
        covariances = read_tensors(file)
    emulator.build(model, made, decomposition.cached(owner.scratch, covariances), harmonizers=harmonizers)
    if params.dlr.after_src and made.layers("harmonizer"):
        trained = emulator.layer_parameters(model, made, "harmonizer")
        dlr.make_up(model, trained, owner.blocks, params.dlr, seed=params.seed, checkpoint=owner.checkpoint)
    return made
