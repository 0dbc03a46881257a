"""How far counts are from the distribution that they should follow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def deviation(counts: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> float:
    """How many standard deviations the chi-square statistic is off; cells expecting few draws are put together."""
    expected = p * counts.sum()
    large = expected >= 10.0
    observed = np.append(counts[large], counts[~large].sum()).astype(np.float64)
    wanted = np.append(expected[large], expected[~large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom == 0:
        return 0.0
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    # Wilson and Hilferty: the cube root is nearly normal.
    return float(((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)))
