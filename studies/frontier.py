"""What a setting is needed for, the best setting for it, and the frontier of utility and secrecy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A setting with one kind of adapters: `line`, `label`, `adapters`, `changes`, figures, and ± of several seeds."""


@dataclass(frozen=True)
class Needs:
    """What a setting has to meet; None where it may be anything."""

    recovery: float | None = None
    """At least, in the task's least noisy metric."""
    lacks: float | None = None
    """Remaining gap: at least, in nats."""
    bytes: float | None = None
    """At most, as a share of the model's."""

    def misses(self, row: Row) -> dict[str, float]:
        """Return by how much a setting misses each need; empty where it meets all."""
        found = {}
        for name, asked, there in (
            ("recovery", self.recovery, row["recovery"]),
            ("lacks", self.lacks, row["remaining gap"]),
            ("bytes", self.bytes and -self.bytes, -row["bytes"]),
        ):
            if asked is not None and not (there is not None and there >= asked):
                found[name] = math.inf if there is None else asked - there
        return found

    def best(self, rows: Sequence[Row]) -> Row:
        """Choose the setting to ship.

        Of those that meet the needs: where a recovery is asked for, the one with the largest remaining gap, else the
        one that recovers most. Where none does: the nearest, by the share of what is asked that it misses.
        """
        if holding := [row for row in rows if not self.misses(row)]:
            wanted = "recovery" if self.recovery is None else "remaining gap"
            return max(holding, key=lambda row: known(row[wanted]))
        asked = {"recovery": self.recovery, "lacks": self.lacks, "bytes": self.bytes}
        return min(rows, key=lambda row: sum(miss / (asked[name] or 1) for name, miss in self.misses(row).items()))


def known(value: float | None) -> float:
    """Order a figure that a run doesn't have below all others."""
    return -math.inf if value is None else value


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Keep settings that no other equals in recovery and remaining gap and beats in one; by rising recovery."""

    def beaten(row: Row) -> bool:
        own = (known(row["recovery"]), known(row["remaining gap"]))
        others = ((known(other["recovery"]), known(other["remaining gap"])) for other in rows)
        return any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in others)

    return sorted((row for row in rows if not beaten(row)), key=lambda row: known(row["recovery"]))


def neighbours(rows: Sequence[Row], chosen: Row) -> list[Row]:
    """Give the chosen setting's neighbours on the frontier: the one with less recovery, then the one with more.

    Where one side has none, the other gives two.
    """
    there = [row for row in frontier(rows) if row is not chosen]
    less = [row for row in there if known(row["recovery"]) < known(chosen["recovery"])]
    more = [row for row in there if known(row["recovery"]) >= known(chosen["recovery"])]
    return [*less[-1:], *more[:1]] if less and more else [*less[-2:][::-1], *more[:2]]


def between(values: Sequence[float], holds: Sequence[bool]) -> list[float]:
    """Give the values between neighbours of a line of which only one meets the needs."""
    pairs = zip(values, values[1:], holds, holds[1:], strict=False)
    return [round((a + b) / 2, 4) for a, b, one, other in pairs if one != other]
