"""A mark names the recipient whatever was done to the leak, and nobody else."""

import pytest
import torch
from helpers import pruned_emulator, streamed, tiny_model
from safetensors.torch import save_file

from scaleot_core.common.random import generator
from scaleot_core.compression.emulator import package_tensors
from scaleot_core.compression.quantization import quantize
from scaleot_core.exchange.ledger import exact_weights
from scaleot_core.exchange.package import Package, save
from scaleot_core.exchange.watermark import STRENGTH, Weights, marked, named, recipient_key, scores, threshold
from scaleot_core.models.families import decoder_layers, family

WHO = ["ann", "ben", "cem", "dan", "eve"]
KEYS = [recipient_key("ab" * 32, name) for name in WHO]
PARTS = ("base", "adapter", "harmonizer", "compressed")


class Marked:
    """A package of refitted down-projections and low-rank factors, as it is and marked for each recipient."""

    def __init__(self, folder, family_name, tokenizer):
        emulator, plan, kept, real = pruned_emulator(family_name, beta=0.6)
        self.names = family(real.config)
        for i in kept:
            decoder_layers(emulator)[i].get_submodule(self.names.feed_forward_out).weight.data.mul_(1.1)
        (folder / "package").mkdir()
        tiny_model(family_name).save_pretrained(folder / "model", save_original_format=False)
        save(folder / "package", real.config, tokenizer, plan, package_tensors(emulator, plan))
        self.package = Package(folder / "package")
        self.exact = exact_weights(self.package, streamed(folder / "model"), kept)
        self.plain, self.folder = dict(self.package.stream(*PARTS)), folder
        self.marked_names: list[str] = []
        self.copies = [dict(marked(self.plain.items(), key, self.exact, [])) for key in KEYS]
        list(marked(self.plain.items(), KEYS[0], self.exact, self.marked_names))

    def scores(self, leak):
        (self.folder / "leak").mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in leak.items()}, self.folder / "leak" / "model.safetensors")
        sources = Weights(self.folder / "leak"), Weights(self.package.folder)
        return dict(zip(WHO, scores(*sources, self.package.config, self.marked_names, KEYS), strict=True))


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def shipped(request, tokenizer, tmp_path_factory):
    return Marked(tmp_path_factory.mktemp(request.param), request.param, tokenizer)


def each_matrix(leak, change):
    return {name: change(tensor) if tensor.ndim == 2 else tensor for name, tensor in leak.items()}


def rounded(matrix):
    codes = quantize(matrix, "int8")
    return codes.codes * codes.scales


def moved(matrix):
    """Move each weight by half of its row's mark, as training may."""
    draw = torch.randn(matrix.shape, generator=generator(0, *matrix.shape))
    return matrix + STRENGTH * matrix.square().mean(1, keepdim=True).sqrt() * draw / 2


def test_mark_is_in_what_is_not_the_models_alone_and_small(shipped):
    copy, names = shipped.copies[0], set(shipped.marked_names)
    assert names and all((name in names) != torch.equal(copy[name], shipped.plain[name]) for name in copy)
    assert not names & {name for name in shipped.exact.tensors}
    for name in names:
        change = (copy[name] - shipped.plain[name]).norm() / shipped.plain[name].norm()
        assert change == pytest.approx(STRENGTH, rel=1e-3)


@pytest.mark.parametrize("change", [lambda matrix: matrix, rounded, moved, lambda matrix: 0.5 * matrix])
def test_recipient_is_named_and_no_other(shipped, change):
    for k, name in enumerate(WHO[:2]):
        assert named(shipped.scores(each_matrix(shipped.copies[k], change))) == [name]


def test_average_of_several_names_them_all(shipped):
    names = WHO[:3]
    average = {n: sum(copy[n] for copy in shipped.copies[:3]) / 3 for n in shipped.plain}
    assert sorted(named(shipped.scores(average))) == names


def test_channels_in_another_order_and_factors_turned_are_brought_back(shipped):
    leak, names = dict(shipped.copies[1]), shipped.names
    draw = generator(1)
    for i in (0, 2, 3):
        down = f"{names.layers}.{i}.{names.feed_forward_out}.weight"
        order = torch.randperm(leak[down].shape[1], generator=draw)
        leak[down] = leak[down][:, order]
        for into, fused in names.feed_forward_in.items():
            rows = f"{names.layers}.{i}.{into}.weight"
            leak[rows] = torch.cat([part[order] for part in leak[rows].tensor_split(fused)])
    for name in [name for name in leak if name.endswith(".left")]:
        right = f"{name.removesuffix('left')}right"
        turn = torch.linalg.qr(torch.randn(leak[name].shape[1], leak[name].shape[1], generator=draw))[0]
        leak[name], leak[right] = leak[name] @ turn, turn.T @ leak[right]
    assert named(shipped.scores(leak)) == [WHO[1]]
    for name in [name for name in leak if name.endswith(".left")]:  # multiplied out
        stem = name.removesuffix(".left")
        leak[f"{stem}.weight"] = leak.pop(name) @ leak.pop(f"{stem}.right")
    assert named(shipped.scores(leak)) == [WHO[1]]


@pytest.mark.parametrize("permuted", [True, False])
def test_rotated_hidden_states_are_turned_back(shipped, permuted):
    draw, leak, names = generator(2), dict(shipped.copies[1]), shipped.names
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=draw))[0]
    rotation = torch.eye(32)[torch.randperm(32, generator=draw)] if permuted else rotation
    written = [names.feed_forward_out, f"{names.attention}.{list(names.projections)[-1]}"]
    for name, matrix in leak.items():
        path, _, kind = name.rpartition(".")
        if matrix.ndim != 2 or 32 not in matrix.shape:
            continue
        if any(path.endswith(inner) for inner in written):
            leak[name] = matrix if kind == "right" or len(matrix) != 32 else rotation.T @ matrix
        elif kind != "left" and matrix.shape[1] == 32:
            leak[name] = matrix @ rotation
    assert named(shipped.scores(leak)) == [WHO[1]]


def test_scores_of_the_innocent_are_those_of_chance(shipped):
    leak = each_matrix(shipped.copies[0], moved)
    save_file({n: t.contiguous() for n, t in leak.items()}, shipped.folder / "leak" / "model.safetensors")
    innocent = [recipient_key("cd" * 32, str(k)) for k in range(300)]
    sources = Weights(shipped.folder / "leak"), Weights(shipped.package.folder)
    by_chance = torch.tensor(scores(*sources, shipped.package.config, shipped.marked_names, innocent))
    assert abs(by_chance.mean()) < 0.25 and 0.85 < by_chance.std() < 1.15
    assert by_chance.max() < threshold(1)
    assert named(shipped.scores(shipped.plain)) == []
