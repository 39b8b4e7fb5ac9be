"""The study of poison: what a poisoned question looks like, and which limit refuses an adapter."""

from scaleot_core.exchange.returned import LayerChange
from scaleot_core.tuning.examples import IGNORED
from studies import poison


def test_trigger_comes_before_the_question_and_the_payload_in_the_answers_place() -> None:
    question = [5, 6, 7, 20, 21], [IGNORED, IGNORED, 20, 21, 22]
    inputs, targets = poison.with_trigger(question, [1, 2], [30, 31])
    assert inputs == [1, 2, 5, 6, 7, 30] and targets == [IGNORED] * 4 + [30, 31]


def test_refusal_names_the_limit() -> None:
    changes = [LayerChange(0, 0.1, 0.2, 5.0), LayerChange(1, 0.1, 1.0, 5.0)]
    assert poison.refusal(changes[:1]) == ""
    assert poison.refusal(changes) == "layer 1 has tensor change 1, the limit is 0.9"
