"""Check parameters, sources and the model before the first heavy stage."""

import os
from pathlib import Path

from scaleot_core.common.errors import UserError
from scaleot_core.common.validation import check_range
from scaleot_core.compression import dlr
from scaleot_core.data import questions
from scaleot_core.data.corpus import local_files
from scaleot_core.data.local_files import is_path
from scaleot_core.exchange.tokenizer import check_shippable
from scaleot_core.models.families import context_length
from scaleot_core.models.loading import load_tokenizer, read_config
from scaleot_core.params import Params, changed


def located(params: Params) -> Params:
    """Return parameters whose local paths start at the project's folder, also in the folder of an experiment."""
    root = Path(os.environ.get("DVC_ROOT", "."))
    paths = {key: root / Path(source).expanduser() for key, source in _sources(params).items()}
    return changed(params, {key: str(path) for key, path in paths.items() if path.exists()})


def _sources(params: Params) -> dict[str, str]:
    return {"model": params.model, "data.questions": params.data.questions, "data.corpus": params.data.corpus}


def check_sources(params: Params) -> None:
    """Raise UserError if a task can't be tuned and scored, or a local folder or file is missing or unusable."""
    for task in params.tasks:
        questions.check(params.data.questions, task)
    for key, value in _sources(params).items():
        if (is_path(value) or (key == "data.questions" and value not in ("embedded", "hub"))) and not Path(
            value
        ).exists():
            raise UserError("no such file or folder; correct the path", parameter=key, value=value)
    if params.data.corpus != "embedded":
        local_files(params.data.corpus)
    folder = Path(params.model)
    if folder.is_dir():
        check_model(params, folder)
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise UserError(
                "no weights (*.safetensors) are in that folder; fetch it again", parameter="model", value=params.model
            )


def check_tokenizer(folder: Path) -> None:
    """Raise UserError if a package couldn't keep the tokenizer in a model's folder as it is."""
    check_shippable(load_tokenizer(folder))


def check_model(params: Params, folder: Path) -> None:
    """Raise UserError if a parameter doesn't fit the model in a folder: its architecture, layers or context length."""
    config = read_config(folder)
    layers = config.num_hidden_layers
    check_range(
        "adapter_layers", params.adapter_layers, layers, least=int("layers" in params.adapters), most=layers - 1
    )
    dlr.validate(params.dlr, layers=layers, blocks=params.data.train_blocks)
    if params.data.block_size > (context := context_length(config)):
        raise UserError(
            f"the model's context is {context} tokens; the range is 8 to {context}",
            parameter="data.block_size",
            value=params.data.block_size,
        )
