"""Every method behind one interface: as its source has it, of equal bytes, and whole through a package."""

import itertools

import pytest
import torch
from helpers import CPU, IDS, each_family, refusal, tiny_model
from torch import nn

from scaleot_core.common.files import folder_bytes, write_json
from scaleot_core.common.runtime import Runtime
from scaleot_core.common.tensors import write_tensors
from scaleot_core.compression.channels import channel_rows, channels_of
from scaleot_core.compression.emulator import assemble, layer_parameters, package_tensors
from scaleot_core.compression.layer_choice import plan_for
from scaleot_core.compression.layer_importance import new_harmonizers
from scaleot_core.compression.low_rank import weight_of
from scaleot_core.compression.plan import layers_of, shared_layers
from scaleot_core.compression.shapes import plan_bytes
from scaleot_core.compression.svd import decompose
from scaleot_core.exchange.package import Package, save
from scaleot_core.exchange.suspicions import SENTENCES, suspicions
from scaleot_core.methods import METHODS, ModelOwner, base, crash, distilled, gradot, uniform
from scaleot_core.models.families import attention, decoder_layers, family
from scaleot_core.models.forward import hidden_states, next_token_loss
from scaleot_core.params import changed
from scaleot_core.training.checkpoint import Checkpoint
from scaleot_core.tuning.adapters import TunedLayers, plug_in

LAYERS = 8
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def owner(tmp_path, blocks, params):
    """The model owner of one family, with a method and a budget."""

    def make(name="llama", method="scaleot", **changes):
        model = tiny_model(name, num_hidden_layers=LAYERS)
        small = {
            "method": method,
            "adapter_layers": 2,
            "dtype": "float32",
            "harmonizer.rank": 4,
            "distill.steps": 3,
            "distill.batch_blocks": 2,
            "channels.ratio": 0.75 if method == "channels" else 0.0,
            "rank_compression.calibration_blocks": 4,
        }
        values = changed(params, {**small, **changes})
        folder = tmp_path / "harmonizers"
        folder.mkdir(exist_ok=True)
        harmonizers = new_harmonizers(model.config, values.harmonizer.rank, seed=0)
        write_tensors(folder / "harmonizers.safetensors", harmonizers.state_dict())
        write_json(folder / "scores.json", {"scores": [float((i * 5) % LAYERS) for i in range(LAYERS)]})
        model.save_pretrained(tmp_path / name, save_original_format=False)
        checkpoint = Checkpoint(tmp_path / "steps", 1e9)
        return ModelOwner(
            tmp_path / name, Runtime(CPU, torch.float32), blocks, values, folder, tmp_path / "scratch", checkpoint
        )

    return make


def emulated(who):
    """A method's plan, and its emulator put together."""
    made = METHODS[who.params.method](who)
    return made.plan, assemble(who.config, made.plan, made.tensors, device=CPU)


# --- what all have in common -----------------------------------------------------------------------------


@each_method
@each_family
def test_package_is_the_emulator_of_the_bytes_that_the_plan_says(name, method, owner, tmp_path, tokenizer):
    who = owner(name, method)
    target = plan_bytes(who.shapes, METHODS[method](who).plan) if method == "channels" else base.target_bytes(who)
    plan, made = emulated(who)
    (tmp_path / "package").mkdir()
    save(tmp_path / "package", who.config, tokenizer, plan, package_tensors(made, plan))
    given = Package(tmp_path / "package")
    loaded, again = given.load(CPU), given.plan
    assert again == plan and len(layers_of(plan, "adapter")) == 2
    torch.testing.assert_close(loaded(IDS).logits, made(IDS).logits)
    assert not torch.allclose(loaded(IDS).logits, tiny_model(name, num_hidden_layers=LAYERS)(IDS).logits)
    assert not suspicions(loaded, plan, tokenizer(list(SENTENCES))["input_ids"], 7)
    size = plan_bytes(who.shapes, plan)
    assert size <= target < who.shapes.model_bytes
    headers = folder_bytes(tmp_path / "package", ".safetensors") - size
    assert 0 < headers < 20_000
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, uncached = (loaded.generate(IDS, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "distilled"])
def test_no_more_than_a_layer_of_the_model_is_read_at_once(method, owner, monkeypatch):
    who, opened, stream = owner(method=method), [], ModelOwner.stream
    monkeypatch.setattr(ModelOwner, "load", lambda self: pytest.fail("the whole model was read"))
    monkeypatch.setattr(ModelOwner, "stream", lambda self: opened.append(stream(self)) or opened[-1])
    most = 0
    for _ in METHODS[method](who).tensors:
        layers = [layer for streamed in opened for layer in streamed._layers]
        most = max(most, sum(not all(t.is_meta for t in layer.state_dict().values()) for layer in layers))
    assert opened and most <= 1


@each_method
def test_adapters_are_the_models_own_layers_and_go_back_into_it(method, owner):
    who = owner(method=method)
    plan, made = emulated(who)
    shipped, real = layer_parameters(made, plan, "adapter"), tiny_model("llama", num_hidden_layers=LAYERS)
    assert all(torch.equal(p, real.get_parameter(name)) for name, p in shipped.items())
    plug_in(real, plan, TunedLayers({name: p + 1 for name, p in shipped.items()}))


@pytest.mark.slow
@each_method
def test_budget_is_kept_and_all_of_it_is_used(method, owner):
    sizes = []
    for share in (0.7, 0.8, 0.9):
        who = owner(method=method, max_bytes_ratio=share)
        sizes.append(plan_bytes(who.shapes, METHODS[method](who).plan) / who.shapes.model_bytes)
        assert share - 0.12 < sizes[-1] <= share
    assert sizes == sorted(sizes)


@each_method
def test_budget_that_is_too_small_is_one_line(method, owner):
    assert "raise `max_bytes_ratio`" in refusal(METHODS[method], owner(method=method, max_bytes_ratio=0.01))


@pytest.mark.slow
@each_method
def test_same_params_give_the_same_bytes(method, owner):
    first, second = owner(method=method), owner(method=method)
    (plan, one), (again, two) = (emulated(who) for who in (first, second))
    assert plan == again
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- uniform ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "kept", "expected"),
    [
        (20, 8, [0, 3, 5, 8, 11, 14, 16, 19]),
        (44, 16, [0, 3, 6, 9, 11, 14, 17, 20, 23, 26, 29, 32, 34, 37, 40, 43]),
        (28, 18, [0, 2, 3, 5, 6, 8, 10, 11, 13, 14, 16, 17, 19, 21, 22, 24, 25, 27]),
        (26, 10, [0, 3, 6, 8, 11, 14, 17, 19, 22, 25]),
        (5, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_evenly_spaced_layers_are_those_of_the_source(count, kept, expected):
    assert uniform.evenly(list(range(count)), kept) == expected


def test_uniform_drops_the_layers_between(owner):
    who = owner(method="uniform")
    plan, made = emulated(who)
    kept = layers_of(plan, "adapter", "compressed")
    real = tiny_model("llama", num_hidden_layers=LAYERS)
    layers = decoder_layers(real)
    real.model.layers = nn.ModuleList(layers[i] for i in kept)
    for i, layer in enumerate(real.model.layers):
        layer.self_attn.layer_idx = i
    assert 2 < len(kept) < LAYERS and {0, LAYERS - 1} <= {*kept}
    assert torch.equal(made(IDS).logits, real(IDS).logits)


# --- distilled -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_distillation_moves_the_kept_layers_alone_and_towards_the_model(owner, blocks):
    start, done = (owner(method="distilled", **{"distill.steps": n, "distill.lr": 1e-3}) for n in (0, 40))
    (plan, start), (again, done) = emulated(start), emulated(done)
    assert again == plan
    moved = {name for name, p in done.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert moved and moved <= layer_parameters(done, plan, "compressed").keys()
    real = tiny_model("llama", num_hidden_layers=LAYERS)
    middle = LAYERS - 2
    teacher = hidden_states(real, blocks)[middle + 1].unflatten(0, blocks.shape)
    square = teacher.square().mean()
    before, now = (distilled.loss(m, blocks, teacher, square, middle).item() for m in (start, done))
    assert now < 0.9 * before


def test_distillation_loss_is_the_sources(owner, blocks):
    who = owner(method="uniform")
    _, made = emulated(who)
    real, middle = tiny_model("llama", num_hidden_layers=LAYERS), LAYERS - 2
    teacher, student = (hidden_states(m, blocks)[middle + 1].unflatten(0, blocks.shape) for m in (real, made))
    rms = teacher.pow(2).mean().sqrt()
    expected = next_token_loss(made, blocks) + 30 * ((teacher - student) / rms).pow(2).mean()
    found = distilled.loss(made, blocks, teacher, rms.square(), middle)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# --- CRaSh -----------------------------------------------------------------------------------------------


def test_cka_is_that_of_gram_matrices():
    x, y = torch.randn(20, 5), torch.randn(20, 7)
    centring = torch.eye(20) - 1 / 20

    def hsic(a, b):
        return torch.trace(centring @ (a @ a.T) @ centring @ (b @ b.T)).item()

    assert crash.cka(x, y) == pytest.approx(hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5, rel=1e-4)
    assert crash.cka(x, 3 * x + 1) == pytest.approx(1.0)


def merged(similarities, count):
    """The source's own way: the two most similar neighbours become one, until `count` are left."""
    clusters = [[i] for i in range(len(similarities) + 1)]
    while len(clusters) > count:
        best = max(range(len(clusters) - 1), key=lambda k: (similarities[clusters[k][-1]], -k))
        clusters[best : best + 2] = [clusters[best] + clusters[best + 1]]
    return [cluster[len(cluster) // 2] for cluster in clusters]


def test_centres_are_those_of_merging_the_most_similar_neighbours():
    for seed, count in itertools.product(range(20), range(1, 13)):
        similarities = torch.rand(11, generator=torch.Generator().manual_seed(seed)).mul(8).round().div(8).tolist()
        assert crash.centres(similarities, count) == merged(similarities, count)


def test_adapters_and_shared_layers_are_those_of_the_sources_scripts():
    kept = [0, 1, 2, 3, 5, 9, 12, 15, 18, 20, 22, 23]
    assert crash.adapters(kept, 4) == [0, 5, 18, 23]
    assert crash.adapters(list(range(22)), 4) == [0, 7, 14, 21]
    shared = {4: 5, 6: 5, 7: 9, 8: 9, 10: 9, 11: 12, 13: 12, 14: 15, 16: 15, 17: 18, 19: 20, 21: 22}
    assert {i: crash.nearest(kept, i) for i in range(24) if i not in kept} == shared


def test_shared_layers_keep_the_shipped_weights_when_the_adapters_are_tuned(owner, tmp_path, tokenizer):
    who = owner(method="crash", max_bytes_ratio=0.6)
    plan, made = emulated(who)
    of_adapters = {i: source for i, source in shared_layers(plan).items() if plan[source].kind == "adapter"}
    assert of_adapters
    (tmp_path / "package").mkdir()
    save(tmp_path / "package", who.config, tokenizer, plan, package_tensors(made, plan))
    loaded = Package(tmp_path / "package").load(CPU)
    for model in (made, loaded):
        before = {i: decoder_layers(model)[i].state_dict()["mlp.up_proj.weight"].clone() for i in of_adapters}
        moved = {name: p + 1 for name, p in layer_parameters(model, plan, "adapter").items()}
        plug_in(model, plan, TunedLayers(moved))
        for i, weight in before.items():
            assert torch.equal(decoder_layers(model)[i].mlp.up_proj.weight, weight)


def test_representation_is_the_weighted_mean_of_a_layers_output(owner, blocks):
    model = owner().load()
    found = crash.representations(owner().stream(), blocks)
    states = model(input_ids=blocks[:2].long(), output_hidden_states=True).hidden_states
    weights = torch.arange(1.0, 17.0)
    expected = (states[3] * weights[:, None]).sum(1) / weights.sum()
    torch.testing.assert_close(found[2][:2], expected, rtol=1e-4, atol=1e-5)
    assert len(found) == LAYERS and found[0].shape == (12, 32)


# --- GradOT ----------------------------------------------------------------------------------------------


def backward_through_all(model, blocks):
    """Backpropagate the sum of the token losses of (B, T) to the embeddings, by the model's own forward."""
    embedded = model.get_input_embeddings()(blocks.long()).requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten().long(), reduction="sum").backward()


@each_family
def test_gradients_of_the_statistics_are_autograds(name, owner, blocks):
    who = owner(name)
    maps, model = gradot.linear_maps(who.config, 2), who.load()
    with gradot.statistics({each: model.get_submodule(each) for each in maps}, blocks[:, 1:].numel()) as found:
        backward_through_all(model, blocks)
    for each in maps:
        model.get_submodule(each).weight.requires_grad_(True)
    next_token_loss(model, blocks).backward()
    for each in maps:
        gradient = model.get_submodule(each).weight.grad
        gradient = gradient.T if name == "gpt2" else gradient
        torch.testing.assert_close(found[each].gradient, gradient, rtol=1e-3, atol=1e-6)


def some_statistics(out, into):
    torch.manual_seed(3)
    g, x = torch.randn(50, out), torch.randn(50, into)
    return gradot.Statistics(x.T @ x / 50, g.T @ g / 50, g.T @ x / 50, g.mean(0))


def cost(found, change, weight):
    """‖H δ‖₁ − λ · Σ g ⊙ δ by the definition."""
    return (found.outputs @ change @ found.inputs).abs().sum() - weight * (found.gradient * change).sum()


@pytest.fixture(params=[0.0, 2.0])
def weight(request, monkeypatch):
    """λ, which GradOT has as a constant."""
    monkeypatch.setattr(gradot, "LAMBDA", request.param)
    return request.param


def test_score_of_a_singular_component_is_that_of_removing_it(weight):
    matrix, found = torch.randn(7, 5), some_statistics(7, 5)
    left, right = decompose(matrix)
    scores = gradot.component_scores((left, right), found)
    for k in range(5):
        torch.testing.assert_close(
            scores[k], cost(found, -torch.outer(left[:, k], right[k]), weight), rtol=1e-4, atol=1e-5
        )


def test_score_of_a_channel_is_that_of_removing_its_rows_and_columns(weight):
    up, gate, down = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)
    first, second, third = some_statistics(6, 4), some_statistics(6, 4), some_statistics(4, 6)
    scores = gradot.channel_scores([(gate, None, first), (up, None, second)], (down, third))
    for c in range(6):
        rows, columns = torch.zeros(6, 4), torch.zeros(4, 6)
        rows[c], columns[:, c] = 1, 1
        expected = (
            cost(first, -gate * rows, weight) + cost(second, -up * rows, weight) + cost(third, -down * columns, weight)
        )
        torch.testing.assert_close(scores[c], expected, rtol=1e-4, atol=1e-5)


def test_the_largest_singular_values_stay_whatever_their_score():
    scores = torch.tensor([-9.0, -8.0, *map(float, range(38))])
    assert gradot.in_order(scores).tolist() == [0, 1, *range(39, 1, -1)]
    assert gradot.in_order(torch.tensor([3.0, 1.0, 2.0])).tolist() == [0, 2, 1]


@each_family
def test_each_layer_is_cut_by_the_statistics_that_the_whole_model_gives(name, owner, blocks, monkeypatch):
    """Though its gradients come a layer at a time: what is kept is chosen as from one backward pass through all."""
    monkeypatch.setattr(gradot, "CALIBRATION_BLOCKS", 7)
    who = owner(name, "gradot")
    built = METHODS["gradot"](who)
    made, model, cut = dict(built.tensors), who.load(), layers_of(built.plan, "compressed")
    maps = {i: gradot.linear_maps(who.config, i) for i in cut}
    modules = {map_name: model.get_submodule(map_name) for names in maps.values() for map_name in names}
    with gradot.statistics(modules, blocks[:7, 1:].numel()) as by_name:
        for batch in blocks[:7].split(gradot.BATCH_BLOCKS):
            backward_through_all(model, batch)
    assert len(cut) > 2
    for i in cut:
        assert torch.equal(gradot.cut_layer(model, i, built.plan[i], by_name), built.channels[i])
        for key, tensor in decoder_layers(model)[i].state_dict().items():
            torch.testing.assert_close(made[f"{family(who.config).layers}.{i}.{key}"], tensor)


@each_family
def test_what_stays_is_the_models_own(name, owner):
    who = owner(name, "gradot", max_bytes_ratio=0.9)
    plan, made = emulated(who)
    real, names = tiny_model(name, num_hidden_layers=LAYERS), family(who.config)
    i = layers_of(plan, "compressed")[0]
    out, whole = (decoder_layers(m)[i].get_submodule(names.feed_forward_out).weight for m in (made, real))
    whole = whole.T if name == "gpt2" else whole
    columns = {tuple(column.tolist()) for column in whole.T}
    assert out.shape[1] == plan[i].channels < whole.shape[1]
    assert all(tuple(column.tolist()) in columns for column in out.T)


# --- ScaleOT ---------------------------------------------------------------------------------------------


def test_without_a_budget_alpha_and_beta_decide(owner):
    who = owner(alpha=0.5, beta=0.5)
    assert METHODS["scaleot"](who).plan == plan_for(who.params, who.scores(), who.shapes)


def test_with_a_budget_harmonizers_are_the_fewest_that_keep_to_it(owner):
    who = owner(max_bytes_ratio=0.8)
    plan = METHODS["scaleot"](who).plan
    fewer = plan_for(who.params, who.scores(), who.shapes, replaced=len(layers_of(plan, "harmonizer")) - 1)
    assert plan_bytes(who.shapes, fewer) > 0.8 * who.shapes.model_bytes >= plan_bytes(who.shapes, plan)


# --- channels --------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("method", ["scaleot", "channels"])
def test_channels_are_cut_and_the_attention_is_the_models_own(name, method, owner):
    who = owner(name, method, **{"channels.ratio": 0.25, "alpha": 0.5, "beta": 0.0})
    plan, made = emulated(who)
    real, names = tiny_model(name, num_hidden_layers=LAYERS), family(who.config)
    for i in layers_of(plan, "compressed"):
        assert channels_of(made, i) == plan[i].channels == channels_of(real, i) * 3 // 4
        into, full = (
            weight_of(decoder_layers(m)[i].get_submodule(next(iter(names.feed_forward_in))))[0] for m in (made, real)
        )
        assert {tuple(row.tolist()) for row in into} < {tuple(row.tolist()) for row in full}
        ours, theirs = (attention(who.config, decoder_layers(m)[i]).state_dict() for m in (made, real))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    if method == "scaleot":
        peer = owner(name, "uniform", **{"channels.ratio": 0.25, "alpha": 0.5, "beta": 0.0})
        assert base.target_bytes(peer) == plan_bytes(who.shapes, plan)


def test_channels_needs_no_scores_and_cuts_as_scaleot_without_its_other_cuts(owner):
    values = {"channels.ratio": 0.5, "channels.tilt": -0.5, "adapter_layers": 0, "adapters": ["lora"]}
    scaleot, channels = owner(method="scaleot", alpha=0.0, beta=0.0, **values), owner(method="channels", **values)
    expected = {name: tensor.clone() for name, tensor in METHODS["scaleot"](scaleot).tensors}
    (channels.harmonizers / "scores.json").unlink()
    built = METHODS["channels"](channels)
    tensors = dict(built.tensors)
    assert built.plan == METHODS["scaleot"](owner(method="scaleot", alpha=0.0, beta=0.0, **values)).plan
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.parametrize("tilt", [0.5, -0.5])
def test_tilt_cuts_one_end_harder_at_equal_bytes(tilt, owner):
    values = {"channels.ratio": 0.5, "adapter_layers": 0, "adapters": ["lora"]}
    even, tilted = (
        METHODS["channels"](owner("llama", "channels", **values, **{"channels.tilt": t})).plan for t in (0, tilt)
    )
    left = [layer.channels for layer in tilted]
    assert left == sorted(left, reverse=tilt < 0) and left[0] != left[-1]
    full = channels_of(tiny_model("llama", num_hidden_layers=LAYERS), 0)
    assert (left[0], left[-1]) == tuple(round(full * (1 - 0.5 * (1 + way * tilt))) for way in (1, -1))
    assert abs(sum(left) - sum(layer.channels for layer in even)) <= LAYERS / 2


def test_channels_of_ratio_zero_is_refused(owner):
    assert "channels.ratio = 0.0" in refusal(METHODS["channels"], owner(method="channels", **{"channels.ratio": 0.0}))


@each_family
@pytest.mark.parametrize("method", ["channels", "gradot"])
def test_owner_knows_which_channels_are_in_the_package(name, method, owner):
    who = owner(name, method, alpha=0.5)
    built = METHODS[method](who)
    made, real = assemble(who.config, built.plan, built.tensors, device=CPU), who.load()
    names = family(real.config)
    assert [*built.channels] and sorted(built.channels) == layers_of(built.plan, "compressed")
    for i, kept in built.channels.items():
        assert len(kept) == built.plan[i].channels and torch.equal(kept, kept.unique())
        for inner, fused in names.feed_forward_in.items():
            here, there = (weight_of(decoder_layers(m)[i].get_submodule(inner)) for m in (made, real))
            rows = channel_rows(kept, channels_of(real, i), fused)
            assert torch.equal(here[0], there[0][rows])
            assert here[1] is None or torch.equal(here[1], there[1][rows])
