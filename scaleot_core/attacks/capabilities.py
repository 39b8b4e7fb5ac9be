"""What a model can do, with choices and without, and how far it is above random weights.

Multiple choice heals first under attack: a model that ranks the right answer first may still not be able to write. So
answers are also asked for openly, and the questions' text, another domain than the corpus, is scored as running text.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scaleot_core.evaluation.harness import evaluate
from scaleot_core.evaluation.tasks import Rows, load_task, metrics, right_choices
from scaleot_core.models.forward import last_hidden_state, logits_of
from scaleot_core.tuning.examples import IGNORED, Example, collate

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def hidden_by_example(
    model: PreTrainedModel, data: Sequence[Example], batch_size: int
) -> Iterator[tuple[int, Tensor, Example]]:
    """Yield each example's number, last hidden states (T, D) and the example, run in batches of similar length."""
    order = sorted(range(len(data)), key=lambda i: len(data[i][0]))
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        hidden = last_hidden_state(model, collate([data[i] for i in at])[0])  # (B, T, D)
        for i, states in zip(at, hidden, strict=True):
            yield i, states[: len(data[i][0])], data[i]


@torch.no_grad()
def open_answers(model: PreTrainedModel, data: Sequence[Example], batch_size: int) -> dict[str, float]:
    """Measure a model on questions with their right answers, no choices given.

    `text_perplexity` is that of question and answer as running text, `answer_tokens` the share of the answers' tokens
    that are the likeliest at their place, `answers` the share of questions whose whole answer the model says greedily.
    """
    nats, tokens, answer_tokens, right_tokens, answers = 0.0, 0, 0, 0, 0
    for _, states, (inputs, targets) in hidden_by_example(model, data, batch_size):
        logits = logits_of(model, states)  # (T, V)
        following = torch.tensor([*inputs[1:], targets[-1]], device=logits.device)
        answer = torch.tensor(targets, device=logits.device) != IGNORED
        right = (logits.argmax(-1) == following)[answer]
        nats += torch.nn.functional.cross_entropy(logits, following, reduction="sum").item()
        tokens, answer_tokens = tokens + len(inputs), answer_tokens + len(right)
        right_tokens, answers = right_tokens + int(right.sum()), answers + bool(right.all())
    return {
        "text_perplexity": math.exp(nats / tokens),
        "answer_tokens": right_tokens / answer_tokens,
        "answers": answers / len(data),
    }


def chance(task: "Task") -> float | None:
    """Compute the accuracy of guessing among a task's choices; 0 where an answer is written, None for texts."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0 if task.OUTPUT_TYPE == "generate_until" else None
    docs = list(task.eval_docs)
    return sum(len(right_choices(task, doc)) / len(task.doc_to_choice(doc)) for doc in docs) / len(docs)


def share(value: float, model: float, floor: float) -> float | None:
    """Compute how much of the way from the floor to the model a figure has; None where there is no such way."""
    return (value - floor) / (model - floor) if model != floor else None


class Yardstick:
    """Measures every model on the same questions, and against the same floor."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Mapping[str, Rows],
        data: Mapping[str, Sequence[Example]],
        batch_size: int,
    ) -> None:
        self.tokenizer, self.questions, self.batch_size = tokenizer, questions, batch_size
        self.data = data
        """The same questions of each task as tokens, with their right answers."""

    def measure(self, model: PreTrainedModel, label: str) -> dict[str, Any]:
        """Measure a model by task: lm-eval's figures under `tasks`, `open_answers` under `open`."""
        return {
            "tasks": evaluate(model, self.tokenizer, self.questions, batch_size=self.batch_size, label=label),
            "open": {task: open_answers(model, data, self.batch_size) for task, data in self.data.items()},
        }

    @cached_property
    def chances(self) -> dict[str, tuple[str, float | None]]:
        """Each task's main metric, and what guessing has in it."""
        loaded = {task: load_task(task, rows, rows) for task, rows in self.questions.items()}
        return {name: (next(iter(metrics(task))), chance(task)) for name, task in loaded.items()}

    def above_floor(
        self, figures: Mapping[str, Any], model: Mapping[str, Any], floor: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Compute how far each figure is from the floor to the model: 0 is the floor, 1 the model.

        `corpus` and each task's `text` are in log-perplexity. A task's main metric has chance for its floor.
        """
        measured = (figures, model, floor)
        shares: dict[str, Any] = {"corpus": share(*(math.log(row["perplexity"]) for row in measured))}
        for task, (metric, guessed) in self.chances.items():
            shares[task] = {"text": share(*(math.log(row["open"][task]["text_perplexity"]) for row in measured))}
            if guessed is not None:
                shares[task][metric] = share(figures["tasks"][task][metric], model["tasks"][task][metric], guessed)
        return shares

    def uniform_guess(self, vocabulary: int) -> dict[str, Any]:
        """Return the perplexities of the uniform distribution over a vocabulary."""
        guess = float(vocabulary)
        return {"perplexity": guess, "open": {task: {"text_perplexity": guess} for task in self.data}}
