"""Counts measured values into buckets. One thread at a time; a quarter of a microsecond per value."""

from __future__ import annotations

from bisect import bisect_left

from millpond.types import Distribution

SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Bounds for anything from a step to a long request: 1 ms to 10 min, neighbours apart by a third to a half."""
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
ROWS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Histogram:
    """Values so far, by bucket."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """``bounds`` rise; a value belongs to the first bound that is not below it."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def copy(self) -> Histogram:
        """The same values; neither learns of the other's later ones."""
        made = Histogram(self._bounds)
        made._counts[:], made._total = self._counts, self._total
        return made

    def distribution(self) -> Distribution:
        """What has been seen so far; later values do not change it."""
        return Distribution(self._bounds, tuple(self._counts), self._total)
