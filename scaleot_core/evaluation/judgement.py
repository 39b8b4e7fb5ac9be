"""Ask a task's definition whether it scores as right what is tuned on."""

from collections.abc import Iterable, Iterator
from itertools import islice
from numbers import Real
from typing import TYPE_CHECKING, Any

from scaleot_core.common.errors import UserError, one_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task

JUDGED = 8  # questions, since one may have an answer that the definition can't read


def check_answers(task: "Task", answers: Iterable[tuple[dict[str, Any], tuple[str, str]]]) -> None:
    """Raise UserError if a task's definition scores each of the first answers as wrong.

    `answers` are questions, each with the context and the continuation that are tuned on. Figures that are no number
    of one question alone, as those of BLEU, tell nothing.
    """
    figures: dict[str, float] = {}
    answer = ""
    for doc, pair in islice(answers, JUDGED):
        answer = pair[1][:60]
        try:
            figures = _figures(task, doc, pair)
        except Exception as error:  # whatever a definition does with an answer that it can't use
            raise UserError(
                f"task {task.config.task}: lm-eval's definition can't score its own answer {answer!r} "
                f"({one_line(error)}); use another task"
            ) from error
        if not figures or any(figures.values()):
            return
    if figures:
        scores = ", ".join(f"{name} {figure:g}" for name, figure in figures.items())
        raise UserError(
            f"task {task.config.task}: lm-eval's definition scores its own answer {answer!r} as wrong ({scores}), so "
            "tuning on it can't help; use another task"
        )


def _figures(task: "Task", doc: dict[str, Any], pair: tuple[str, str]) -> dict[str, float]:
    """Return the best of each figure that is the better the higher it is, over filters, where a model says `pair`."""
    higher_is_better, best = task.higher_is_better(), dict[str, float]()
    for requests in _answered(task, doc, pair):
        for chosen in task._filters:
            chosen.apply(requests)
            results = [request.filtered_resps[chosen.name] for request in requests]
            for name, figure in task.process_results(doc, results).items():
                if isinstance(figure, Real) and higher_is_better.get(name, True):
                    best[name] = max(best.get(name, 0.0), float(figure))
    return best


def _answered(task: "Task", doc: dict[str, Any], pair: tuple[str, str]) -> Iterator[list[Any]]:
    """Yield a question's requests with what a model answers that has learnt `pair`."""
    requests: Any = task.construct_requests(doc, task.fewshot_context(doc, 0), metadata=(task.config.task, 0, 1))
    if task.OUTPUT_TYPE == "multiple_choice":
        for request in requests:
            request.resps = [(0.0, True) if request.args == pair else (-1e3, False)]
        yield requests
        return
    ends, text = task.config.generation_kwargs["until"], pair[1]
    for end in filter(None, [ends] if isinstance(ends, str) else ends):  # where generation stops
        text = text.partition(end)[0]
    for answer in (text, text.lstrip()):  # tokenizers of SentencePiece lose the blank before it
        requests.resps = [answer] * (task.config.repeats or 1)
        yield [requests]
