"""Decide what of a record is left out, so that the rest fits into the model's context."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from scaleot_core.records.encoding import Encoded
from scaleot_core.records.forms import Message
from scaleot_core.records.tally import CUT, PRIVATE, TOO_LONG, Tally

Part = tuple[list[int], Encoded]
"""The answers that are learnt in a part of a conversation, by the numbers of their messages, and its tokens."""


@dataclass(frozen=True)
class Context:
    """A model's context, and a tally of what is left out to fit into it."""

    length: int
    tally: Tally = field(default_factory=Tally)
    now: datetime | None = None
    """The date that a chat template is given; None for today's."""

    def excess(self, encoded: Encoded) -> int:
        """Count tokens beyond the context; the last token is only a target."""
        return max(0, len(encoded.tokens) - self.length - 1)

    def newest_turns(
        self, messages: list[Message], part: Part, encode: Callable[[list[Message], list[int]], Part]
    ) -> Encoded:
        """Leave out the oldest turns of a conversation, but for a system prompt, until the rest fits.

        A turn begins with a question of the user; the last one stays in any case. `encode` renders the rest anew, as
        the model would see it.
        """
        answers, encoded = part
        head = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
        rest, shorter = part
        for first in range(head + 1, answers[-1]):
            if not self.excess(shorter):
                break
            if messages[first]["role"] == "user":
                remaining = messages[:head] + messages[first : answers[-1] + 1]
                rest, shorter = encode(remaining, [i - (first - head) for i in answers if i >= first])
        self.tally.tokens_cut += len(encoded.tokens) - len(shorter.tokens)
        self.tally.answers_left_out += Counter({CUT: len(answers) - len(rest)})
        return shorter

    def fit(self, parts: Sequence[Encoded], *, packed: bool, bos: int | None) -> list[Encoded]:
        """Return the parts of a record that can be learnt, each without the beginning that is too long.

        A BOS stays in front; an answer that loses its own beginning isn't learnt. Not `packed`, the last part alone is
        learnt. ValueError where the record's last answer is longer than the context.
        """
        *earlier, last = parts
        if last.answer_length > self.length:
            raise ValueError(
                f"its last answer has {last.answer_length:,} tokens, the context {self.length:,}; shorten it, or "
                "delete the record"
            )
        fitting = [part for part in earlier if part.answer_length <= self.length]
        self.tally.answers_left_out += Counter({TOO_LONG: len(earlier) - len(fitting)})
        if not packed:
            self.tally.answers_left_out += Counter({PRIVATE: sum(len(part.learnt) for part in fitting)})
            fitting = []
        return [self._cut_between_answers(part, bos) for part in (*fitting, last)]

    def _cut_between_answers(self, encoded: Encoded, bos: int | None) -> Encoded:
        excess = self.excess(encoded)
        if not excess:
            return encoded
        learnt = [(first, last) for first, last in encoded.learnt if first > excess]
        self.tally.answers_left_out += Counter({CUT: len(encoded.learnt) - len(learnt)})
        shorter = self.cut(Encoded(encoded.tokens, learnt))
        if encoded.tokens[0] == bos:
            shorter.tokens[0] = encoded.tokens[0]
        return shorter

    def cut(self, encoded: Encoded) -> Encoded:
        """Cut off the beginning that is too long, as lm-eval does it."""
        excess = self.excess(encoded)
        self.tally.tokens_cut += excess
        learnt = [(max(first - excess, 0), last - excess) for first, last in encoded.learnt if last > excess]
        return Encoded(encoded.tokens[excess:], learnt)
