"""A model read layer by layer is the model; memory does not grow with its depth."""

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from damages import DAMAGES
from helpers import CPU, each_family, each_head, refusal, streamed, tiny_model

from scaleot_core.common.files import write_json
from scaleot_core.common.tensors import read_tensors, write_tensors
from scaleot_core.compression.layer_importance import new_harmonizers
from scaleot_core.exchange.package import Package
from scaleot_core.models.families import decoder_layers
from scaleot_core.models.forward import hidden_of, hidden_states, hooks
from scaleot_core.params import changed


def stored(folder, name="llama", shard="1KB", **changes):
    """A model and the same one on disk, in many small files."""
    model = tiny_model(name, **changes)
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=False)
    return model


@each_head
@each_family
def test_every_tensor_is_the_models(tmp_path, name, tied):
    model, other = stored(tmp_path, name, tie_word_embeddings=tied), streamed(tmp_path)
    state = model.state_dict()
    found = {n: other.read(n) for n in other.outside}
    for i in range(4):
        with other.layer(i) as layer:
            found |= {f"{other.path}.{i}.{n}": tensor.clone() for n, tensor in layer.state_dict().items()}
    assert found.keys() == state.keys() - set(model.all_tied_weights_keys)
    assert all(torch.equal(found[n], state[n]) for n in found)


@each_family
@pytest.mark.parametrize("rows", [1, 5, 12, 99])
def test_what_passes_the_layers_is_what_passes_the_models(tmp_path, blocks, name, rows):
    model, other = stored(tmp_path, name), streamed(tmp_path)
    passed = {}

    @contextmanager
    def around(i, layer):
        def keep(module, args, out):
            passed.setdefault(i, []).append(hidden_of(out).flatten(0, 1))

        with hooks(layer.register_forward_hook(keep)):
            yield

    other.run(blocks, around, batch_blocks=rows)
    expected = hidden_states(model, blocks, batch_blocks=rows)[1:]
    assert [*passed] == [0, 1, 2, 3]
    for i, outputs in passed.items():
        assert torch.equal(torch.cat(outputs), expected[i])
    assert all(tensor.is_meta for tensor in other.model.state_dict().values())
    assert [*decoder_layers(other.model)] == other._layers  # the model's own are back


def test_weights_come_in_the_dtype_asked_for(tmp_path):
    stored(tmp_path)
    other = streamed(tmp_path, torch.bfloat16)
    with other.layer(1) as layer:
        assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_is_one_line(tmp_path, blocks, damage):
    stored(tmp_path, shard="1GB")
    damage(tmp_path)
    assert str(tmp_path) in refusal(lambda: streamed(tmp_path).run(blocks, lambda i, layer: nullcontext()))


def test_weights_of_another_shape_are_one_line(tmp_path, blocks):
    stored(tmp_path, shard="1GB")
    file, name = tmp_path / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    tensors = {n: t.clone() for n, t in read_tensors(file).items()}
    write_tensors(file, {**tensors, name: tensors[name].T})
    said = refusal(lambda: streamed(tmp_path).run(blocks, lambda i, layer: nullcontext()))
    assert str(tmp_path) in said and "is (32, 64), not (64, 32)" in said


PEAK = """
import json, sys
from pathlib import Path
import torch
from scaleot_core.common.runtime import Runtime
from scaleot_core.exchange import package
from scaleot_core.methods import METHODS, ModelOwner
from scaleot_core.models.loading import load_tokenizer
from scaleot_core.params import load_params
from scaleot_core.training.checkpoint import Checkpoint

status = lambda: dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
mib = lambda name: int(status()[name].split()[0]) / 1024
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    params = load_params(folder / "params.yaml")
    blocks = torch.randint(0, 299, (8, 32), dtype=torch.int32)
    runtime = Runtime(torch.device("cpu"), torch.float32)
    owner = ModelOwner(folder, runtime, blocks, params, folder, folder / "scratch", Checkpoint(folder, 1e9))
    (folder / "package").mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = mib("VmRSS")
    made = METHODS["scaleot"](owner)
    package.save(folder / "package", owner.config, load_tokenizer(folder), made.plan, made.tensors)
    print(json.dumps(mib("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux has it")
def test_memory_does_not_grow_with_the_layers(tmp_path, tokenizer, params):
    """Compressing takes what a layer and its decomposition take, however many layers there are."""
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_key_value_heads": 4, "head_dim": 128}
    layer = (4 * 512**2 + 3 * 512 * 4096) * 4 / 2**20  # MiB
    values = changed(params, {"adapter_layers": 1, "harmonizer.rank": 8, "rank_compression.calibration_blocks": 8})
    depths = (2, 4, 16)  # the first is there for what Python imports on the way
    for depth in depths:
        folder = tmp_path / str(depth)
        stored(folder, num_hidden_layers=depth, **wide)
        tokenizer.save_pretrained(folder)
        (folder / "params.yaml").write_text(yaml.safe_dump(values.model_dump()))
        harmonizers = new_harmonizers(tiny_model("llama", num_hidden_layers=depth, hidden_size=512).config, 8, seed=0)
        write_tensors(folder / "harmonizers.safetensors", harmonizers.state_dict())
        write_json(folder / "scores.json", {"scores": [float(i) for i in range(depth)]})
    folders = [str(tmp_path / str(depth)) for depth in depths]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, few, many = map(json.loads, done.stdout.split())
    loaded = Package(tmp_path / "16" / "package").load(CPU)
    assert len(decoder_layers(loaded)) == 16
    assert abs(many - few) < 2 * layer  # twelve layers more, and garbage of one or two by chance
    assert layer < many < 4 * layer
