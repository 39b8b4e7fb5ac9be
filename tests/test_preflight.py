"""Before the first heavy stage what doesn't fit is refused by its key."""

import json

import pytest
from helpers import CONFIGS, refusal, tiny_model

from scaleot_core import preflight
from scaleot_core.models.families import FAMILIES
from scaleot_core.params import changed
from scaleot_core.preflight import check_model, check_sources


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def fitting(params, folder):
    """Parameters that ask for all that the tiny model has: 4 layers, 128 tokens of context."""
    return changed(params, {"model": str(folder), "adapter_layers": 3, "dlr.group_size": 4, "data.block_size": 128})


# --- sources ---------------------------------------------------------------------------------------------


def test_sources_that_are_there_or_are_names_pass(params, fitting, folder, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    for name in [f"{task}/{part}.jsonl" for task in params.tasks for part in ("train", "test")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_sources(params)
    check_sources(changed(params, {"model": "org/name", "data.questions": "hub", "data.corpus": "org/text"}))
    check_sources(changed(fitting, {"data.questions": str(tmp_path), "data.corpus": str(tmp_path / "text.jsonl")}))


@pytest.mark.parametrize(
    ("key", "path"),
    [
        *(
            (key, path)
            for key in ("model", "data.questions", "data.corpus")
            for path in ("./none", "../none", "~/none")
        ),
        ("data.questions", "lab"),  # which can be no name
        ("data.corpus", "lab/text.jsonl"),
    ],
)
def test_missing_path_is_named_by_its_key(params, tmp_path, monkeypatch, key, path):
    monkeypatch.chdir(tmp_path)
    said = refusal(check_sources, changed(params, {key: path}))
    assert said.startswith(f"{key} = {path!r}: no such file or folder")


def test_corpus_of_no_kind_that_is_read_is_named_before_the_model_is_fetched(params, tmp_path):
    (tmp_path / "corpus.md").write_text("some text")
    said = refusal(check_sources, changed(params, {"data.corpus": str(tmp_path / "corpus.md")}))
    assert said.startswith(f"data.corpus = '{tmp_path / 'corpus.md'}': of no kind that is read")


def test_home_folder_is_known(params, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.TXT").write_text("a")
    assert preflight.located(changed(params, {"data.corpus": "~/text.TXT"})).data.corpus == str(tmp_path / "text.TXT")


def test_folder_without_weights_is_named(fitting, folder):
    (folder / "model.safetensors").unlink()
    said = refusal(check_sources, fitting)
    assert said.startswith(f"model = {str(folder)!r}: no weights") and "safetensors" in said


@pytest.mark.parametrize("config", [None, "{", "{}"], ids=["none", "half", "empty"])
def test_folder_without_a_configuration_is_named(fitting, folder, config):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert str(folder) in refusal(check_sources, fitting)


# --- the model -------------------------------------------------------------------------------------------


def test_unsupported_architecture_names_the_supported_ones(fitting, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    for check in (lambda: check_sources(fitting), lambda: check_model(fitting, folder)):
        said = refusal(check)
        assert said.startswith("model: architecture 'bert' is not supported") and all(name in said for name in FAMILIES)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])  # which name their sizes in three ways
@pytest.mark.parametrize(
    ("key", "least_wrong", "has", "limit"),
    [
        ("adapter_layers", 4, "4 decoder layers", "1 to 3"),
        ("dlr.group_size", 5, "4 decoder layers", "2 to 4"),
        ("data.block_size", 129, "128 tokens", "8 to 128"),
    ],
)
def test_parameter_larger_than_the_model_is_named(fitting, tmp_path, name, key, least_wrong, has, limit):
    CONFIGS[name].save_pretrained(tmp_path / name)
    check_model(fitting, tmp_path / name)  # one less is the model's own size, and fits
    said = refusal(check_model, changed(fitting, {key: least_wrong}), tmp_path / name)
    assert said.startswith(f"{key} = {least_wrong}: ") and has in said and limit in said


def test_local_model_is_checked_with_the_sources(fitting):
    assert "adapter_layers = 5" in refusal(check_sources, changed(fitting, {"adapter_layers": 5}))
