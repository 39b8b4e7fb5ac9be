"""Evaluation, all of it lm-eval's own: its `evaluate` over the model in memory (method section 6)."""

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.common.errors import UserError
from scaleot_core.common.progress import say
from scaleot_core.evaluation.fields import Rows
from scaleot_core.evaluation.tasks import answer_pairs, load_task, metric_name, metrics, right_choices
from scaleot_core.models.families import context_length

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from scaleot_core.evaluation.lm import InMemoryLM


def lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1, label: str = ""
) -> "InMemoryLM":
    """Wrap a model in memory for lm-eval; progress is shown under `label`."""
    from scaleot_core.evaluation.lm import InMemoryLM

    context = context_length(model.config)
    return InMemoryLM(label=label, pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Rows],
    *,
    batch_size: int,
    label: str,
) -> dict[str, dict[str, Any]]:
    """Measure a model zero-shot on each task's questions.

    Per task: lm-eval's own metrics, such as `acc`, `exact_match` or `word_perplexity`, each with its `_stderr`;
    `answer_nll`, the mean negative log-likelihood (nats) of the right answer (the likeliest, where several are right),
    summed over its tokens, or, of texts that are scored as a whole, `token_perplexity`; the number of `questions`; the
    task's `version`. `tasks.metrics` lists them.
    """
    import lm_eval

    for name, rows in questions.items():
        if len(rows) < 2:
            raise UserError(f"task {name}: a standard error needs two questions; raise data.eval_questions")
    say(f"{label}: {', '.join(f'{name} ({len(rows)} questions)' for name, rows in questions.items())}")
    tasks = {name: load_task(name, rows, rows) for name, rows in questions.items()}
    view = lm(model, tokenizer, batch_size, label)
    for task in tasks.values():
        task.set_config("num_fewshot", 0)
    # `simple_evaluate` would ask pip, git, the compiler and the driver for their versions after each evaluation
    results = lm_eval.evaluate(
        lm=view,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        bootstrap_iters=100,  # accuracies have a closed form; only a value above zero is needed
    )
    assert results is not None  # only processes over which lm-eval itself splits the questions get None
    return {name: _figures(results, name, task, view) for name, task in tasks.items()}


def _figures(results: dict[str, Any], name: str, task: "Task", view: "InMemoryLM") -> dict[str, Any]:
    figures: dict[str, Any] = {}
    filters = [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]]
    for key, value in results["results"][name].items():
        metric, _, by = key.partition(",")
        if by in filters and isinstance(value, float):
            stem = metric.removesuffix("_stderr")
            figures[metric_name(stem, by if len(filters) > 1 else "none") + metric.removeprefix(stem)] = value
    samples = [sample for sample in results["samples"][name] if sample["filter"] == filters[0]]
    ours = _of_texts(samples, task, view) if task.OUTPUT_TYPE == "loglikelihood_rolling" else _nll(samples, task, view)
    return figures | ours | {"questions": len(samples), "version": results["versions"][name]}


def _nll(samples: list[dict[str, Any]], task: "Task", view: "InMemoryLM") -> dict[str, float]:
    """Collect the right answers' negative log-likelihood: from the choices that were scored, else scored now."""
    if task.OUTPUT_TYPE == "multiple_choice":
        nll = [
            -max(float(sample["filtered_resps"][choice][0]) for choice in right_choices(task, sample["doc"]))
            for sample in samples
        ]
    else:
        from lm_eval.api.instance import Instance

        pairs = answer_pairs(task, view.tokenizer, context_length=view.max_length, part="evaluation")
        asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
        nll = [-value for value, _ in view.loglikelihood(asked)]
    _check_finite(task, nll)
    return {"answer_nll": statistics.fmean(nll), "answer_nll_stderr": statistics.stdev(nll) / len(nll) ** 0.5}


def _check_finite(task: "Task", values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        name = task.config.task
        raise UserError(f"task {name}: a likelihood is not finite; mend the model's weights or use dtype float32")


def _of_texts(samples: list[dict[str, Any]], task: "Task", view: "InMemoryLM") -> dict[str, float]:
    """Compute the perplexity per token, and the standard errors of all figures of texts, which lm-eval doesn't give.

    Each is a ratio of two sums over texts, nll by words, bytes or tokens, with a ratio estimator's error.
    """
    errors: dict[str, float] = {}
    nll = [-float(sample["filtered_resps"][0]) for sample in samples]
    _check_finite(task, nll)
    units = {
        metric: [float(sample[metric][1]) for sample in samples]
        for metric in metrics(task)
        if all(isinstance(sample.get(metric), tuple) for sample in samples)
    }
    units["token_perplexity"] = [float(len(view.tok_encode(str(task.doc_to_target(s["doc"]))))) for s in samples]
    for metric, counts in units.items():
        ratio = sum(nll) / sum(counts)
        residuals = [loss - ratio * count for loss, count in zip(nll, counts, strict=True)]
        error = math.sqrt(len(nll) / (len(nll) - 1) * sum(residual**2 for residual in residuals)) / sum(counts)
        errors[f"{metric}_stderr"] = error / math.log(2) if metric == "bits_per_byte" else math.exp(ratio) * error
    return errors | {"token_perplexity": math.exp(sum(nll) / sum(units["token_perplexity"]))}
