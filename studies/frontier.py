"""What a setting is needed for, the best setting for it, and the frontier of utility and secrecy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from studies.keys import Changes
from studies.means import Means


@dataclass(frozen=True)
class Setting:
    """One setting of the parameters with one kind of adapters, and its figures: means over its seeds."""

    line: str
    """The line of choose.yaml that it is on."""
    value: float
    """Where on the line."""
    adapters: str
    """The kind."""
    changes: Changes
    """To params.yaml."""
    seeds: int
    """How many it was run with."""
    means: Means
    """Over these seeds."""

    def figure(self, column: str) -> float:
        """Return a mean to compare by; one that is undefined is below all others."""
        mean = self.means[column]
        return -math.inf if mean is None else mean[0]


@dataclass(frozen=True)
class Needs:
    """What a setting has to meet; None where it may be anything."""

    recovery: float | None = None
    """At least, in the task's least noisy metric."""
    lacks: float | None = None
    """Remaining gap: at least, in nats."""
    bytes: float | None = None
    """At most, as a share of the model's."""

    def misses(self, setting: Setting) -> dict[str, float]:
        """Return by how much a setting misses each need; empty where it meets all."""
        shortfalls = {
            "recovery": None if self.recovery is None else self.recovery - setting.figure("recovery"),
            "lacks": None if self.lacks is None else self.lacks - setting.figure("remaining gap"),
            "bytes": None if self.bytes is None else setting.figure("bytes") - self.bytes,
        }
        return {name: missing for name, missing in shortfalls.items() if missing is not None and missing > 0}

    def best(self, settings: Sequence[Setting]) -> Setting:
        """Choose the setting to ship.

        Of those that meet the needs: where a recovery is asked for, the one with the largest remaining gap, else the
        one that recovers most. Where none does: the nearest, by the share of what is asked that it misses.
        """
        if meeting := [setting for setting in settings if not self.misses(setting)]:
            column = "recovery" if self.recovery is None else "remaining gap"
            return max(meeting, key=lambda setting: setting.figure(column))
        asked = {"recovery": self.recovery, "lacks": self.lacks, "bytes": self.bytes}
        return min(
            settings, key=lambda setting: sum(miss / (asked[name] or 1) for name, miss in self.misses(setting).items())
        )


def frontier(settings: Sequence[Setting]) -> list[Setting]:
    """Keep settings that no other equals in recovery and remaining gap and beats in one; by rising recovery."""
    points = [(setting.figure("recovery"), setting.figure("remaining gap")) for setting in settings]

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)

    unbeaten = [setting for setting, point in zip(settings, points, strict=True) if not beaten(point)]
    return sorted(unbeaten, key=lambda setting: setting.figure("recovery"))


def neighbours(settings: Sequence[Setting], chosen: Setting) -> list[Setting]:
    """Return the chosen setting's neighbours on the frontier: the one with less recovery, then the one with more.

    Where one side has none, the other gives two.
    """
    others = [setting for setting in frontier(settings) if setting is not chosen]
    less = [setting for setting in others if setting.figure("recovery") < chosen.figure("recovery")]
    more = [setting for setting in others if setting.figure("recovery") >= chosen.figure("recovery")]
    return [*less[-1:], *more[:1]] if less and more else [*less[-2:][::-1], *more[:2]]
