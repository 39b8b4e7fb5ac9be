"""Seconds, tokens and peak memory of every stage on a GPU, at the whole shapes of a row of the paper's table.

`make bench-gpu MODELS="opt-1.3b llama-7b"` runs the pipeline on each, and the attack, and prints a table: seconds of
the stage without its imports, tokens through the model in each second of it, and MiB of the GPU's memory, as torch
counts it, and of the process. Blocks and batches are the paper's, steps few. The weights are random: speed and memory
only, no claim. A stage that fails has the reason in its row, and the rest goes on.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from project import Cost, Project
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast

from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.errors import UserError
from scaleot_core.common.files import write_jsonl
from scaleot_core.common.progress import console, say
from scaleot_core.training.checkpoint import scratch_dir

MODELS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "opt-1.3b": (
        OPTConfig(
            hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
        ),
        {"harmonizer.rank": 64},
    ),
    "llama-7b": (
        LlamaConfig(),
        {"harmonizer.rank": 256, "method": "channels", "channels.ratio": 0.6, "adapter_layers": 1},
    ),
}
"""Their configuration, and what is set for them: the default emulator, or, for the larger, feed-forward channels."""
CHANGES: dict[str, Any] = {
    "model": "model",
    "tasks": ["piqa"],
    "data.questions": "questions",
    "data.corpus": "corpus.jsonl",
    "device": "cuda",
    "checkpoint_seconds": 1e9,  # 16 bytes a weight
    "data.block_size": 512,
    "data.train_blocks": 64,
    "data.heldout_blocks": 8,
    "layer_importance.calibration_blocks": 16,
    "layer_importance.steps": 50,
    "dlr.steps": 20,
    "dlr.batch_blocks": 8,
    "dlr.score_blocks": 8,
    "rank_compression.calibration_blocks": 16,
    "offsite_tune.batch_size": 32,
    "offsite_tune.epochs": 1,
    "full_finetune.batch_size": 32,
    "full_finetune.epochs": 1,
    "attack.steps": 4,
    "attack.eval_points": 1,
    "attack.eval_questions": 16,
    "attack.attackers": [],
    "attack.references": [],
}
QUESTIONS = 256
STAGES = (
    *("prepare_data", "layer_importance", "train_harmonizers", "compress"),
    *("offsite_tune piqa layers", "offsite_tune piqa lora", "zero_shot piqa", "full_finetune piqa"),
    *("evaluate", "attack"),
)


def write_model(folder: Path, config: PretrainedConfig) -> None:
    """Write a transformers folder of random weights in bfloat16, with a tokenizer whose tokens are bytes."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<eos>"])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Write questions in PIQA's format, and a corpus."""
    for part, first in (("train", 0), ("validation", QUESTIONS)):
        rows = [
            {"goal": f"count to {i}", "sol1": f"from 1 to {i}", "sol2": f"from {i}", "label": 0}
            for i in range(first, first + QUESTIONS)
        ]
        write_jsonl(folder / "questions" / "piqa" / f"{part}.jsonl", rows)
    texts = [{"text": f"passage {i} " + " ".join(str(i * k % 97) for k in range(60))} for i in range(400)]
    write_jsonl(folder / "corpus.jsonl", texts)


def cells(cost: Cost) -> list[str]:
    """Write a cost's cells; stages that count no tokens have no rate."""
    rate = f"{cost['tokens'] / cost['seconds']:,.0f}" if cost["tokens"] else "–"
    return [f"{cost['seconds']:.1f}", rate, f"{cost['peak_gpu_memory_mib']:,.0f}", f"{cost['peak_memory_mib']:,.0f}"]


def measure(name: str, place: Path) -> Table:
    """Run the stages in turn on a model of MODELS, saying what each took; tabulate it."""
    config, changes = MODELS[name]
    table = Table("stage", "seconds", "tokens/s", "GPU MiB", "process MiB", title=f"{name}, random weights")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        write_model(Path(folder) / "model", config)
        write_data(Path(folder))
        project = Project(Path(folder), {**CHANGES, **changes})
        for stage in STAGES:
            try:
                row = [stage, *cells(project.run(stage))]
            except UserError as error:
                row = [stage, error.message]
            say(f"{name}: {'  '.join(row)}")
            table.add_row(*row)
    return table


def main() -> None:
    names = sys.argv[1:]
    if not names or set(names) - set(MODELS):
        raise UserError(f"name models of {', '.join(MODELS)}: make bench-gpu MODELS=opt-1.3b")
    place = scratch_dir("bench")
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        console.print(measure(name, place.resolve()))


if __name__ == "__main__":
    run_command(main)
