"""Count what becomes of records on their way to examples, so that nothing is left out without a word."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Why an answer isn't learnt.
CUT = "their turns don't fit into the context"
TOO_LONG = "they are longer than the context"
UNASKED = "nothing comes before them in their conversation"
PRIVATE = "a private record is one example, and the chat template rewrites them in the one of its last answer"

LOST = "cut"  # why a record has a place among `Tally.places`, beside the reasons above
NAMED = 5  # places that a line names


def name_places(places: list[str]) -> str:
    """Name the first of some places, such as `line 3, line 7 and 12 more`."""
    shown = places[:NAMED]
    return ", ".join(shown) + (f" and {len(places) - len(shown):,} more" if len(places) > len(shown) else "")


@dataclass
class Tally:
    """How many records there are, and what of them isn't learnt."""

    records: int = 0
    cut: int = 0
    """Records that are too long for the context."""
    tokens_cut: int = 0
    """Tokens that they lost."""
    answers_left_out: Counter[str] = field(default_factory=Counter)
    """How many, by reason."""
    reworded: int = 0
    """Answers that the chat template renders otherwise than word for word."""
    endless: int = 0
    """Records of which the chat template doesn't have the end of an answer learnt."""
    ignored: Counter[str] = field(default_factory=Counter)
    """In how many records there is a field that isn't read, by its name."""
    switched_off: int = 0
    """Answers that a switch of theirs, such as `weight`: 0, keeps from being learnt."""
    untemplated: int = 0
    """Records whose prompt is a text, where the model has a chat template."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """Where the records lie that are cut, or lose answers, by the reason of the latter."""

    @contextmanager
    def record(self, place: str) -> Iterator[None]:
        """Count one record, and note its place for all that is counted of it meanwhile."""
        tokens_cut, left_out = self.tokens_cut, self.answers_left_out.copy()
        yield
        self.records += 1
        reasons = list(self.answers_left_out - left_out)
        if self.tokens_cut > tokens_cut:
            self.cut += 1
            reasons.append(LOST)
        for reason in reasons:
            self.places.setdefault(reason, []).append(place)

    def lines(self, context_length: int) -> Iterator[str]:
        """Say each of it in a line for a person; nothing where all is learnt."""
        if self.untemplated:
            yield (
                "each prompt is used as it stands, without the model's chat template; write `messages` for what goes "
                "through it"
            )
        if self.cut:
            yield (
                f"{self.cut:,} of {self.records:,} records are too long for the model's context of "
                f"{context_length:,} tokens and lost their beginning, {self.tokens_cut:,} tokens in all"
                f"{self._where(LOST)}"
            )
        for reason, count in self.answers_left_out.items():
            yield f"{count:,} answers are not learnt: {reason}{self._where(reason)}"
        if self.switched_off:
            yield f"{self.switched_off:,} answers are not learnt: their records switch them off"
        if self.reworded:
            yield f"{self.reworded:,} answers are learnt as the model's chat template renders them, not word for word"
        if self.endless:
            yield (
                f"in {self.endless:,} of {self.records:,} records no end of an answer is learnt, since the model's "
                "chat template has none or doesn't mark it: the tuned model may not stop"
            )
        if self.ignored:
            fields = ", ".join(f"`{name}` in {count:,}" for name, count in sorted(self.ignored.items()))
            yield f"fields that are not read, and in how many of {self.records:,} records: {fields}"

    def _where(self, reason: str) -> str:
        places = self.places.get(reason, [])
        return f" ({name_places(places)})" if places else ""
