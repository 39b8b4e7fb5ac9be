"""What a setting has to meet, the best setting for it, and its neighbours on the frontier."""

import pytest

from studies.frontier import Needs, Setting, frontier, neighbours


def setting(recovery: float | None, gap: float, share: float = 0.7) -> Setting:
    means = {"recovery": None if recovery is None else (recovery, None), "remaining gap": (gap, None)}
    return Setting("line", gap, "lora", {}, 1, means | {"bytes": (share, None)})


SETTINGS = [
    setting(0.95, 0.2, 0.8),
    setting(0.9, 0.5, 0.7),
    setting(0.85, 0.4, 0.7),
    setting(0.7, 1.0, 0.5),
    setting(None, 1.5, 0.4),
]


@pytest.mark.parametrize(
    ("needs", "index", "misses"),
    [
        (Needs(recovery=0.8), 1, {}),
        (Needs(recovery=0.95), 0, {}),
        (Needs(lacks=0.45), 1, {}),
        (Needs(lacks=1.2), 4, {}),
        (Needs(bytes=0.6), 3, {}),
        (Needs(recovery=0.6, bytes=0.75), 3, {}),
        (Needs(recovery=0.99), 0, {"recovery": 0.04}),
        (Needs(bytes=0.3), 4, {"bytes": 0.1}),
        (Needs(recovery=0.9, lacks=0.6), 1, {"lacks": 0.1}),
    ],
    ids=str,
)
def test_best_setting_holds_what_is_asked_and_gives_most_of_the_rest(
    needs: Needs, index: int, misses: dict[str, float]
) -> None:
    best = needs.best(SETTINGS)
    assert SETTINGS.index(best) == index
    assert needs.misses(best) == pytest.approx(misses)


def test_frontier_leaves_out_what_another_setting_beats() -> None:
    best, good, _, secret, undefined = SETTINGS
    assert frontier(SETTINGS) == [undefined, secret, good, best]
    assert neighbours(SETTINGS, good) == [secret, best]
    assert neighbours(SETTINGS, best) == [good, secret] and neighbours(SETTINGS, undefined) == [secret, good]
    assert neighbours([best, good], best) == [good] and neighbours([best], best) == []
