"""Parameters: the file agrees with its fields, and one line names the key that is wrong, its value and its range."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from helpers import ROOT, refusal
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from scaleot_core.params import Params, changed, load_params

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


def fields(block: type[BaseModel] = Params, before: str = "") -> dict[str, FieldInfo]:
    """Every key of params.yaml as the code declares it, blocks before what is in them."""
    found = {}
    for name, field in block.model_fields.items():
        found[before + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{before}{name}.")
    return found


def comments() -> dict[str, str]:
    """The comment beside every key of the file, empty where there is none."""
    found, block = {}, ""
    for indent, name, comment in re.findall(r"^( *)(\w+):[^#\n]*(?:# *(.*))?$", TEXT, flags=re.MULTILINE):
        block = block if indent else f"{name}."
        found[f"{block}{name}" if indent else name] = comment
    return found


def with_value(key, value):
    """The file's content with one value changed or added."""
    values = yaml.safe_load(TEXT)
    *blocks, last = key.split(".")
    block = values
    for name in blocks:
        block = block[name]
    block[last] = value
    return yaml.safe_dump(values)


def load(folder, text):
    file = folder / "params.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_params(file)


def refused(folder, text) -> str:
    """What is said of such a file, without its path."""
    said = refusal(load, folder, text)
    assert said.startswith(f"{folder / 'params.yaml'}: ")
    return said.removeprefix(f"{folder / 'params.yaml'}: ")


# --- the repository's file -------------------------------------------------------------------------------


def test_repositorys_file_gives_its_values(params):
    values = yaml.safe_load(TEXT)
    for block in ("offsite_tune", "lora", "full_finetune"):
        values[block]["lr"] = [values[block]["lr"]]  # one stands for a list of one
    assert params.model_dump() == values


def test_every_key_of_the_file_has_a_field_and_every_field_its_meaning():
    assert comments().keys() == fields().keys()
    for key, field in fields().items():
        is_block = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert field.annotation.__doc__ if is_block else field.description, key


def kind(key: str, field: FieldInfo) -> str:
    """What the comment of a key begins with: its type, or its choices, and its range."""
    if get_origin(field.annotation) is Literal:
        return " | ".join(get_args(field.annotation))
    if get_origin(field.annotation) is list:
        (inner,) = get_args(field.annotation)
        choices = " | ".join(get_args(inner)) if get_origin(inner) is Literal else "str"
        return f"list of {'float, or one' if key.endswith('.lr') else choices}"
    low = [(name, getattr(m, name)) for m in field.metadata for name in ("ge", "gt") if hasattr(m, name)]
    high = [(name, getattr(m, name)) for m in field.metadata for name in ("le", "lt") if hasattr(m, name)]
    written = field.annotation.__name__
    if not high:
        return written
    if low[0][0] == "ge":
        return f"{written}, {low[0][1]:g} to {high[0][1]:g}"
    return f"{written}, above {low[0][1]:g}, {'at most' if high[0][0] == 'le' else 'below'} {high[0][1]:g}"


def test_every_comment_is_the_fields_type_range_and_description():
    said = comments()
    for key, field in fields().items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert said[key] == field.annotation.__doc__.splitlines()[0].rstrip("."), key
        else:
            assert said[key] == f"{kind(key, field)}: {field.description}", key


def test_defaults_in_the_code_are_the_files_values(params):
    assert params == Params()


def test_parameter_that_the_file_leaves_out_is_named(tmp_path):
    """It has a default in the code, but DVC couldn't notice that another version has another one."""
    assert refused(tmp_path, TEXT.replace("beta: 0.8", "# beta")).startswith("beta is missing; ")
    assert refused(tmp_path, re.sub(r"^  group_size:.*$", "", TEXT, flags=re.MULTILINE)).startswith(
        "dlr.group_size is missing; "
    )


def test_ranges_in_comments_are_the_fields_own(tmp_path):
    """Each end of a range that a comment gives is accepted, and what lies beyond it is not."""
    ranges = {key: re.search(r"float, (\S+) to ([\d.]+):", comment) for key, comment in comments().items()}
    given = {key: (float(found[1]), float(found[2])) for key, found in ranges.items() if found}
    assert {"alpha", "beta", "offsite_tune.warmup_ratio"} <= given.keys()
    for key, (low, high) in given.items():
        for value in (low, high):
            load(tmp_path, with_value(key, value))
        for value in (low - 0.001, high + 0.001):
            assert refused(tmp_path, with_value(key, value)).startswith(f"{key} = {value}: ")


def test_parameters_cannot_be_changed_on_the_way(params):
    with pytest.raises(ValidationError):
        params.alpha = 0.5
    with pytest.raises(ValidationError):
        params.offsite_tune.lr = 0.5


def test_no_layer_has_to_be_shipped_whole_where_lora_alone_is_tuned(params):
    assert changed(params, {"adapters": ["lora"], "adapter_layers": 0}).adapter_layers == 0
    wrong = {"adapters": ["lora"], "adapter_layers": 0, "lora.layers": "adapter"}
    assert "no layer is there for LoRA" in refusal(changed, params, wrong)


# --- what is refused -------------------------------------------------------------------------------------

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("alpha", 1.5, "the range is 0 to 1"),
    ("alpha", -0.1, "the range is 0 to 1"),
    ("beta", float("nan"), "the range is 0 to 1"),
    ("full_finetune.warmup_ratio", 1.01, "the range is 0 to 1"),
    ("dlr.lr", 0, "the range is above 0, at most 1"),
    ("offsite_tune.lr", 2.0, "the range is above 0, at most 1"),
    ("offsite_tune.delta", 1.0, "the range is above 0, below 1"),
    ("offsite_tune.lr", [], "at least 1 item"),
    ("full_finetune.validation_fraction", 1.1, "the range is 0 to 1"),
    ("adapter_layers", 0, "need at least 1"),
    ("adapter_layers", -1, "the least is 0"),
    ("adapters", [], "at least 1 item"),
    ("adapters", ["lora", "lora"], "named twice"),
    ("lora.rank", 0, "the least is 1"),
    ("lora.alpha", 0.0, "the range is above 0"),
    ("seed", -1, "the least is 0"),
    ("data.block_size", 7, "the least is 8"),
    ("dlr.group_size", 1, "the least is 2"),
    ("dlr.score_lr", float("inf"), "the range is above 0"),
    ("offsite_tune.max_steps", -1, "the least is 0"),
    ("tasks", [], "at least 1 item"),
    ("data.corpus", "", "at least 1 character"),
]


@pytest.mark.parametrize(("key", "value", "said"), OUT_OF_RANGE)
def test_value_out_of_range_is_named_with_the_range(tmp_path, key, value, said):
    message = refused(tmp_path, with_value(key, value))
    assert message.startswith(f"{key} = {value!r}: ") and said in message


WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("seed", "two", "integer"),
    ("adapter_layers", 2.5, "integer"),
    ("offsite_tune.lr", "1e-4x", "number"),
    ("alpha", None, "number"),
    ("rank_compression.whiten", "maybe", "boolean"),
    ("model", 7, "string"),
    ("tasks", "piqa", "list"),
    ("tasks", {"piqa": 1}, "list"),
    ("data", 5, "dictionary"),
    ("offsite_tune", None, "dictionary"),
    ("adapters", "lora", "list"),
    ("device", "gpu", "'auto', 'cpu' or 'cuda'"),
    ("layer_importance.estimator", "guess", "'sensitivity' or 'block_influence'"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG_TYPES)
def test_value_of_the_wrong_type_is_named(tmp_path, key, value, said):
    message = refused(tmp_path, with_value(key, value))
    assert message.startswith(f"{key} = {value!r}: ") and said in message


@pytest.mark.parametrize("key", ["alpha", "adapter_layers", "offsite_tune.lr"])
def test_truth_value_is_no_number(tmp_path, key):
    """YAML reads `no` as false: `alpha: no` would be α = 0."""
    assert refused(tmp_path, with_value(key, True)).startswith(f"{key} = True: ")


@pytest.mark.parametrize("name", ["../piqa", "a/b", "", "-piqa", "two words"])
def test_task_name_that_is_no_folder_name_is_refused(tmp_path, name):
    """It becomes part of paths and of a shell command."""
    assert refused(tmp_path, with_value("tasks", ["piqa", name])).startswith(f"tasks.1 = {name!r}: ")


def test_task_named_twice_is_refused(tmp_path):
    message = refused(tmp_path, with_value("tasks", ["piqa", "sciq", "piqa"]))
    assert message.startswith("tasks = ['piqa', 'sciq', 'piqa']: ") and "named twice" in message


@pytest.mark.parametrize("key", ["alhpa", "data.blocksize", "dlr.alpha", "full_finetune.epoch"])
def test_key_that_is_no_parameter_is_named(tmp_path, key):
    assert refused(tmp_path, with_value(key, 1)).startswith(f"{key} is no parameter; ")


@pytest.mark.parametrize("key", ["alpha", "block_size"])
def test_mistyped_key_is_named_as_it_was_typed(tmp_path, key):
    text = re.sub(rf"\b{key}: ", f"{key}x: ", TEXT)
    assert f"{key}x is no parameter" in refused(tmp_path, text)


@pytest.mark.parametrize("key", [key for key in fields() if "full_finetune." not in key])
def test_missing_key_is_named(tmp_path, key):
    """No parameter has a default: the file is all there is to know."""
    values = yaml.safe_load(TEXT)
    *blocks, last = key.split(".")
    del (values[blocks[0]] if blocks else values)[last]
    assert refused(tmp_path, yaml.safe_dump(values)).startswith(f"{key} is missing; ")


# --- the file itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["alpha: [1", "alpha: 1\n\tbeta: 2", "{", "a: \0"], ids=repr)
def test_invalid_yaml_is_one_line(tmp_path, text):
    assert refused(tmp_path, text).startswith("not valid YAML (")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"model: 2020-13-45\n"], ids=["not UTF-8", "impossible date"])
def test_text_that_yaml_cannot_take_is_one_line(tmp_path, text):
    assert refused(tmp_path, text)


def test_learning_rate_of_a_list_is_named(tmp_path):
    said = refused(tmp_path, with_value("offsite_tune.lr", [1e-4, 3.0]))
    assert said.startswith("offsite_tune.lr.1 = 3.0: ") and "the range is above 0, at most 1" in said


RATES = {"offsite_tune.lr": [1e-4, 1e-3]}
CONTRADICTIONS = [
    (RATES | {"offsite_tune.validation_fraction": 0.0}, "offsite_tune.validation_fraction = 0.0: several"),
    ({"full_finetune.lr": [1e-4, 1e-3], "full_finetune.validation_fraction": 0.0}, "full_finetune.validation_fraction"),
    (RATES | {"offsite_tune.epsilon": 8.0}, "offsite_tune.epsilon = 8.0: with it held-out examples can't choose"),
    ({"offsite_tune.patience": 1, "offsite_tune.epsilon": 8.0}, "offsite_tune.epsilon = 8.0: with it"),
    ({"lora.lr": [1e-4, 1e-3], "offsite_tune.epsilon": 8.0}, "lora: held-out examples choose one of several lr"),
    ({"lora.lr": [1e-4, 1e-3], "offsite_tune.validation_fraction": 0.0}, "lora: held-out examples choose"),
    ({"channels.ratio": 0.8, "channels.tilt": -0.5}, "channels.tilt = -0.5: with ratio 0.8"),
]


@pytest.mark.parametrize(("changes", "said"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_named(changes, said):
    assert refusal(changed, Params(), changes).startswith(said)
    assert changed(Params(), {key: value for key, value in changes.items() if "lr" in key})


@pytest.mark.parametrize("text", ["", "# nothing\n", "- alpha\n", "alpha\n"], ids=repr)
def test_file_without_keys_is_refused(tmp_path, text):
    assert refused(tmp_path, text).startswith("the file = ")


def test_missing_file_is_named(tmp_path):
    assert refusal(load_params, tmp_path / "params.yaml").startswith(f"{tmp_path / 'params.yaml'}: no such file; ")


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_scientific_notation_is_a_number(tmp_path, written):
    """PyYAML reads `1e-4` as text."""
    assert isinstance(yaml.safe_load("1e-4"), str)
    lr = load(tmp_path, re.sub(r"^(  lr:) \S+", rf"\1 {written}", TEXT, flags=re.MULTILINE)).offsite_tune.lr
    assert lr == [1e-4] and isinstance(lr[0], float)


# --- dvc.yaml --------------------------------------------------------------------------------------------


def test_no_study_lies_on_the_main_path():
    """DVC runs whatever writes into a folder that a stage reads."""
    main, studies = (yaml.safe_load((ROOT / name).read_text())["stages"] for name in ("dvc.yaml", "studies/dvc.yaml"))
    read = {dependency for stage in main.values() for dependency in stage["deps"]}
    outs = [next(iter(out)) if isinstance(out, dict) else out for s in studies.values() for out in s.get("outs", [])]
    assert len(outs) == 1
    assert not [(out, deps) for out in outs for deps in read if Path(out).is_relative_to(deps)]


def test_every_parameter_is_a_dependency_of_the_stages_that_read_it():
    """A key that dvc.yaml forgets could change and nothing would run again."""
    files = [yaml.safe_load((ROOT / name).read_text()) for name in ("dvc.yaml", "studies/dvc.yaml")]
    stages = {name: stage for file in files for name, stage in file["stages"].items()}
    watched = {name for stage in stages.values() for name in stage["params"]}
    assert watched <= fields().keys()
    keys = {key for key in fields() if not any(other.startswith(f"{key}.") for other in fields())}
    missed = {key for key in keys if key not in watched and key.partition(".")[0] not in watched}
    assert missed == {"device", "threads", "launch", "checkpoint_seconds"}  # where and how a run happens


def test_key_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text() + "\nalpha: 0.9\n")
    assert "the key 'alpha' is there twice" in refusal(load_params, tmp_path / "params.yaml")
