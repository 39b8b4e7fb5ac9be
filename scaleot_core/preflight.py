"""What a run will do and cost, checked and said before the first heavy stage."""

import os
import time
from pathlib import Path

import torch
from rich.table import Table
from transformers import PretrainedConfig

from scaleot_core.artifacts import Artifacts
from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import console
from scaleot_core.common.runtime import Runtime
from scaleot_core.common.validation import check_range
from scaleot_core.compression import dlr
from scaleot_core.compression.local_fit import BATCH_TOKENS
from scaleot_core.compression.svd import decompose
from scaleot_core.data.corpus import local_files
from scaleot_core.data.local_files import ROWS, TEXTS, has_suffix
from scaleot_core.exchange.tokenizer import check_shippable
from scaleot_core.memory import too_large
from scaleot_core.models.families import context_length, family
from scaleot_core.models.loading import empty_model, load_tokenizer, read_config
from scaleot_core.params import Params, changed
from scaleot_core.settings import Tuning

QUESTION_TOKENS = 30  # of a typical question with its answer
ALL_CHOICES_TOKENS = 50  # of a typical question with all of its choices, whose context runs once
OVERHEAD_SECONDS = 15  # of one stage: imports and loading
SMALL = 256  # rows and columns of the matrix that a decomposition is timed on
EFFICIENCY = 0.4  # of a large matrix product's rate that a small model reaches
SLOW = 1.5  # times that float32 may be faster before it is said


def located(params: Params) -> Params:
    """Parameters whose local files are found in the project's folder, also from the folder of an experiment."""
    root = Path(os.environ.get("DVC_ROOT", "."))
    given = {"model": params.model, "data.questions": params.data.questions, "data.corpus": params.data.corpus}
    paths = {key: root / Path(path).expanduser() for key, path in given.items()}
    return changed(params, {key: str(path) for key, path in paths.items() if path.exists()})


def check_sources(params: Params) -> None:
    """UserError where a local folder or file that params.yaml names isn't there or can't be used."""
    for key, value in (
        ("model", params.model),
        ("data.questions", params.data.questions),
        ("data.corpus", params.data.corpus),
    ):
        is_path = value.startswith((".", "/", "~")) or has_suffix(value, (*ROWS, *TEXTS))
        is_path = is_path or (key == "data.questions" and value not in ("embedded", "hub"))
        if is_path and not Path(value).exists():
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
    """UserError where a parameter doesn't fit the model in a folder: its architecture, layers or context length."""
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


def _tuning_tokens(tuning: Tuning, questions: int) -> int:
    seen = questions * tuning.epochs
    runs = 1 + len(tuning.lr) if len(tuning.lr) > 1 else 1
    return runs * QUESTION_TOKENS * (min(seen, tuning.max_steps * tuning.batch_size) if tuning.max_steps else seen)


def forward_tokens(params: Params) -> dict[str, float]:
    """Tokens that each stage sends through the model, in units of one forward pass; a backward pass counts double.

    A backward pass through frozen layers counts once: it needs the gradient of their input alone.
    """
    block, tasks = params.data.block_size, len(params.tasks)
    fits, steps = params.layer_importance, params.dlr.steps
    layers = 30  # of a typical model, each with its sensitivity, which takes those behind it
    scoring = params.data.eval_questions * ALL_CHOICES_TOKENS * tasks
    lora = params.offsite_tune.model_copy(update={"lr": params.lora.lr})
    tunings = [lora if kind == "lora" else params.offsite_tune for kind in params.adapters]
    candidates = steps // params.dlr.score_interval * params.dlr.candidates
    return {
        "layer_importance": block * (fits.calibration_blocks + layers / 2 * fits.sensitivity_blocks)
        + 0.1 * fits.steps * BATCH_TOKENS,
        "train_harmonizers": block * params.dlr.batch_blocks * (2 * steps + candidates),
        "compress": block * params.rank_compression.calibration_blocks if params.rank_compression.whiten else 0,
        "zero_shot": scoring,
        "full_finetune": scoring + 3 * tasks * _tuning_tokens(params.full_finetune, params.data.train_questions),
        "offsite_tune": 2 * tasks * sum(_tuning_tokens(each, params.data.train_questions) for each in tunings),
        "evaluate": (1 + 2 * len(params.adapters)) * scoring,
    }


def _rate(runtime: Runtime, dtype: torch.dtype) -> float:
    """Measure the floating-point operations a second of a matrix product on this device."""
    a = torch.randn(1024, 1024).to(runtime.device, dtype)
    for warm in (True, False):
        start, count = time.perf_counter(), 2 if warm else 6
        for _ in range(count):
            result = a @ a
        result.float().sum().item()
    return count * 2 * 1024**3 / (time.perf_counter() - start)


def _decomposition_seconds(config: PretrainedConfig) -> float:
    """Seconds that the decompositions of all attention projections take: measured on a small one, cubic in its size."""
    start = time.perf_counter()
    decompose(torch.randn(SMALL, SMALL))
    one = (time.perf_counter() - start) * (config.hidden_size / SMALL) ** 3
    return one * sum(family(config).projections.values()) * config.num_hidden_layers


def _processes(params: Params, stage: str) -> int:
    """Count the items of a stage's matrix."""
    if stage == "offsite_tune":
        return len(params.tasks) * len(params.adapters)
    return len(params.tasks) if stage in ("zero_shot", "full_finetune") else 1


def show(params: Params, model: Path, runtime: Runtime) -> None:
    """Print the stages to come, where they run, and about how long each takes."""
    config = read_config(model)
    parameters = empty_model(config, buffers_too=True).num_parameters()
    rate = _rate(runtime, runtime.dtype) * EFFICIENCY
    table = Table(
        title=f"What will run: α = {params.alpha}, β = {params.beta}, {params.model}, {', '.join(params.tasks)}"
    )
    table.add_column("stage")
    table.add_column("tokens through the model", justify="right")
    table.add_column("about", justify="right")
    total = 0.0
    for stage, tokens in forward_tokens(params).items():
        processes = _processes(params, stage)
        seconds = tokens * 2 * parameters / rate + OVERHEAD_SECONDS * processes
        seconds += _decomposition_seconds(config) if stage == "compress" else 0
        total += seconds
        table.add_row(stage, f"{tokens:,.0f}", f"{seconds / 60:.1f} min")
    table.add_row("all", "", f"{total / 60:.0f} min", style="bold")
    console.print(table)
    where = f"{runtime.device.type} in {params.dtype}, {torch.get_num_threads()} threads"
    console.print(f"{parameters / 1e6:.0f} M parameters on {where}")
    if params.dtype != "float32" and (faster := _rate(runtime, torch.float32) * EFFICIENCY / rate) > SLOW:
        console.print(
            f"{params.dtype} is slow here: with dtype = float32 matrix products are {faster:.1f} times as fast",
            style="yellow",
        )
    for refused in too_large(Artifacts(model.parent), runtime, split="fsdp" in params.launch):
        console.print(refused, style="yellow")
