"""How much longer a decode forward takes with draft tokens to verify: measured at start, corrected by every such step.

Rows and columns cost alike as far as matrix products go, so the measured curve is one over rows x columns; what
attention adds in long contexts the corrections learn. Pure; engine thread only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from statistics import median

import msgspec

TOKENS = (1, 2, 4, 8, 16, 32)
"""Tokens in the forwards that are measured, a single row of them."""
ROUNDS = 2
MOST_SECONDS = 2.0
"""No further size is measured after so long."""
MEMORY = 7
"""Latest observations whose median corrects the curve: a pause of the machine is not a property of the forward."""


RELAX = 32
"""Plain steps after which one observation is forgotten: a pace that is thought too slow would never be tried again."""


class Curve(msgspec.Struct, frozen=True):
    """Milliseconds of a forward by how many tokens it takes in, rising."""

    points: tuple[tuple[int, float], ...] = ((1, 1.0), (32, 3.0))

    def at(self, tokens: int) -> float:
        """Between and beyond the points along straight lines."""
        points = self.points
        place = min(max(1, bisect_left(points, tokens, key=lambda point: point[0])), len(points) - 1)
        (low, below), (high, above) = points[place - 1], points[place]
        return max(below + (above - below) * (tokens - low) / (high - low), points[0][1])


def measured(forward_seconds: Callable[[int], float], most: int) -> Curve:
    """The curve of a model; ``forward_seconds`` runs one row of so many tokens, at most ``most``."""
    points: list[tuple[int, float]] = []
    spent = forward_seconds(1)  # the first of all is slower
    for tokens in TOKENS:
        if tokens > most or (len(points) > 1 and spent > MOST_SECONDS):
            break
        seconds = [forward_seconds(tokens) for _ in range(ROUNDS)]
        spent += sum(seconds)
        points.append((tokens, max(1000 * min(seconds), points[-1][1] if points else 0.0)))
    return Curve(tuple(points)) if len(points) > 1 else Curve()


class Pace:
    """The curve with what steps have taught about it."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self._seen: dict[tuple[int, int], deque[float]] = {}
        self._plain = 0

    def factor(self, rows: int, columns: int) -> float:
        """How many times as long as with one column a forward of so many columns takes; never less than once."""
        seen = self._seen.get(_size(rows, columns))
        return max(1.0, self._expected(rows, columns) * (median(seen) if seen else 1.0))

    def _expected(self, rows: int, columns: int) -> float:
        return self._curve.at(rows * columns) / self._curve.at(rows)

    def observe(self, rows: int, columns: int, factor: float) -> None:
        """A forward of so many columns took ``factor`` times as long as one column would have."""
        seen = self._seen.setdefault(_size(rows, columns), deque([1.0], maxlen=MEMORY))
        seen.append(factor / self._expected(rows, columns))

    def plain(self) -> None:
        """A plain step."""
        self._plain += 1
        if self._plain % RELAX == 0:
            for seen in self._seen.values():
                seen.append(1.0)


def _size(rows: int, columns: int) -> tuple[int, int]:
    return rows.bit_length(), (columns - 1).bit_length()
