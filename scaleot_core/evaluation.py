"""Evaluation, all of it lm-eval's own: `simple_evaluate` over the model in memory (method section 6)."""

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.errors import UserError
from scaleot_core.progress import progress, say
from scaleot_core.tasks import OWN_TASKS, Rows, load_task

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM


def lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1) -> "HFLM":
    """lm-eval's view of a model in memory: it encodes, batches and scores."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _watched(view: "HFLM", model: PreTrainedModel, batch_size: int, label: str) -> "HFLM":
    """The view with our progress in the place of lm-eval's own bars."""
    score = view.loglikelihood

    def loglikelihood(requests: list["Instance"]) -> list[tuple[float, bool]]:
        with progress(label, math.ceil(len(requests) / batch_size)) as tick:
            hook = model.register_forward_hook(lambda _, args, out: tick(tokens=args[0].numel()))
            try:
                return score(requests, disable_tqdm=True)
            finally:
                hook.remove()

    view.loglikelihood = loglikelihood  # type: ignore[method-assign,assignment]
    return view


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Rows],
    *,
    batch_size: int,
    label: str,
) -> dict[str, dict[str, Any]]:
    """Zero-shot figures of a model on each task's questions.

    Per task: `acc` and, where the task defines it, `acc_norm`, each with its `_stderr`, as lm-eval gives them;
    `answer_nll`, the mean negative log-likelihood (nats) of the right answer, summed over its tokens, with its
    standard error; the number of `questions`; the task's `version`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name, rows in questions.items():
        if len(rows) < 2:
            raise UserError(f"task {name}: a standard error needs two questions; raise data.eval_questions")
    say(f"{label}: {', '.join(f'{name} ({len(rows)} questions)' for name, rows in questions.items())}")
    tasks = [load_task(name, rows, rows) for name, rows in questions.items()]
    results = simple_evaluate(
        model=_watched(lm(model, tokenizer, batch_size), model, batch_size, label),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(OWN_TASKS), include_defaults=False),  # the default one takes 10 s
        num_fewshot=0,
        bootstrap_iters=100,  # accuracies have a closed form; only a value above zero is needed
        log_samples=True,
    )
    assert results is not None
    return {name: _figures(results, name) for name in questions}


def _figures(results: dict[str, Any], name: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for key, value in results["results"][name].items():
        metric, _, of = key.partition(",")
        if of == "none" and isinstance(value, float):
            figures[metric] = value
    nll = [-sample["filtered_resps"][int(sample["target"])][0] for sample in results["samples"][name]]
    if not all(map(math.isfinite, nll)):
        raise UserError(
            f"task {name}: an answer's likelihood is not finite; mend the model's weights or use dtype float32"
        )
    return figures | {
        "answer_nll": statistics.fmean(nll),
        "answer_nll_stderr": statistics.stdev(nll) / len(nll) ** 0.5,
        "questions": len(nll),
        "version": results["versions"][name],
    }
