"""How long a prefill chunk or a decode step takes on this machine, learnt from the steps that were measured.

Both are small linear models with non-negative coefficients, fitted to relative error with recent steps counting most.
Invariants: predictions are finite, never negative and grow with the work. Used by the engine thread only.
"""

from __future__ import annotations

import math

from millpond.memory.budget import UNLIMITED

MEMORY = 0.95
"""Weight an observation keeps when the next one arrives."""
STIFFNESS = 0.05
"""How strongly a coefficient stays where it was when the data cannot tell it from the leading one."""
SLOW, SLOW_IN_A_ROW = 1.5, 3
"""One step this much slower than predicted is a pause; so many in a row mean that the machine has changed."""


class LinearFit:
    """ms = coefficients · features, recursively fitted. ``leading``: the one that explains what no other does."""

    def __init__(self, coefficients: list[float], leading: int) -> None:
        self.coefficients = coefficients
        self._leading = leading
        self._forget()

    def _forget(self) -> None:
        self._gram = [[0.0] * len(self.coefficients) for _ in self.coefficients]
        self._target = [0.0] * len(self.coefficients)
        self._slow, self._seen = 0, False

    def predict(self, features: tuple[float, ...]) -> float:
        return sum(c * x for c, x in zip(self.coefficients, features, strict=True))

    def observe(self, features: tuple[float, ...], ms: float) -> None:
        """Learn from one measurement; times that are not positive and finite are ignored."""
        if not (0.0 < ms < math.inf):
            return
        self._slow = self._slow + 1 if self._seen and ms > SLOW * self.predict(features) else 0
        if self._slow >= SLOW_IN_A_ROW:
            self._forget()
        self._seen = True
        # Dividing by ms fits the relative error, so a long pause weighs little and small chunks count as much as big.
        scaled = [x / ms for x in features]
        for i, x in enumerate(scaled):
            self._target[i] = MEMORY * self._target[i] + x
            for j, y in enumerate(scaled):
                self._gram[i][j] = MEMORY * self._gram[i][j] + x * y
        self._solve()

    def _solve(self) -> None:
        """Least squares, tied softly to the last solution; a coefficient that comes out negative is fixed at 0."""
        used = [i for i in range(len(self.coefficients)) if self._gram[i][i] > 0.0]
        while used:
            norm = [math.sqrt(self._gram[i][i]) for i in used]
            tie = [1e-6 if i == self._leading else STIFFNESS for i in used]
            matrix = [[self._gram[i][j] / (norm[p] * norm[q]) for q, j in enumerate(used)] for p, i in enumerate(used)]
            right = [self._target[i] / norm[p] + tie[p] * self.coefficients[i] * norm[p] for p, i in enumerate(used)]
            for p, extra in enumerate(tie):
                matrix[p][p] += extra
            solution = [x / n for x, n in zip(_eliminate(matrix, right), norm, strict=True)]
            worst = min(range(len(used)), key=lambda p: solution[p] * norm[p])
            if solution[worst] >= 0.0:
                for i, value in zip(used, solution, strict=True):
                    self.coefficients[i] = value
                return
            self.coefficients[used.pop(worst)] = 0.0


def _eliminate(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small symmetric positive definite system, in place; such a system needs no pivoting."""
    size = len(right)
    for p in range(size):
        for q in range(p + 1, size):
            factor = matrix[q][p] / matrix[p][p]
            right[q] -= factor * right[p]
            for r in range(p, size):
                matrix[q][r] -= factor * matrix[p][r]
    for p in reversed(range(size)):
        right[p] = (right[p] - sum(matrix[p][q] * right[q] for q in range(p + 1, size))) / matrix[p][p]
    return right


class CostModel:
    """Milliseconds of a step's parts. Before the first measurement it assumes a slow CPU."""

    def __init__(self) -> None:
        self._prefill = LinearFit([0.0, 3.0, 0.0], leading=1)
        self._decode = LinearFit([50.0, 1.0, 0.0], leading=0)

    def observe_prefill(self, start: int, tokens: int, ms: float, prompts: int = 1) -> None:
        """A chunk of ``tokens`` after ``start`` earlier ones took ``ms``, its adoption into a row included if any; or
        those of several ``prompts`` in one forward, filled up to the longest and behind the longest."""
        if tokens > 0:
            self._prefill.observe((1.0, prompts * tokens, prompts * tokens * (start + tokens / 2)), ms)

    def observe_decode(self, rows: int, context_tokens: int, ms: float) -> None:
        """One decode of ``rows`` rows that hold ``context_tokens`` keys in all took ``ms``."""
        if rows > 0:
            self._decode.observe((1.0, rows, context_tokens), ms)

    def prefill_ms(self, start: int, tokens: int, prompts: int = 1) -> float:
        """fixed + prompts * tokens * (a + b * (start + tokens / 2)); 0 for no tokens. As observed."""
        fixed, linear, attention = self._prefill.coefficients
        return fixed + prompts * tokens * (linear + attention * (start + tokens / 2)) if tokens > 0 else 0.0

    def decode_ms(self, rows: int, context_tokens: int) -> float:
        """c0 + c1 * rows + c2 * context_tokens; 0 for no rows."""
        return self._decode.predict((1.0, rows, context_tokens)) if rows > 0 else 0.0

    def tokens_within(self, start: int, ms: float) -> int:
        """The longest chunk after ``start`` tokens that is predicted to take at most ``ms``."""
        fixed, linear, attention = self._prefill.coefficients
        slope, spare = linear + attention * start, ms - fixed
        if spare <= 0.0:
            return 0
        # The root of attention/2·n² + slope·n = spare, in the form that stays exact when attention is near 0.
        root = slope + math.sqrt(slope * slope + 2.0 * attention * spare) if spare < math.inf else 0.0
        return int(min(2.0 * spare / root, UNLIMITED)) if root > 0.0 else UNLIMITED
