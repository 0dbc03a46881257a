"""Randomness addressed by (seed, position): the same pair gives the same draw on every machine, for ever.

There is no generator state. Neighbours in the batch, preemption, speculation and restarts therefore cannot shift a
draw. Integer arithmetic only; any thread may call it. The golden values in tests/sample/test_noise.py pin the function:
changing it changes the answer of every seeded request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_BITS = 31
"""Bits per word of ``words``: a product of two words fits a signed 64-bit integer."""

_MASK = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15
_SEED_SALT = 0x5851F42D4C957F2D


def bits(seed: int, position: int) -> int:
    """64 uniform bits for a request seed and a token position; both are taken modulo 2**64.

    The seed is hashed first, so that neighbouring seeds start at unrelated places of one counter sequence, and every
    counter value is hashed twice, so that neighbouring positions share no structure.
    """
    start = _mix((seed ^ _SEED_SALT) & _MASK)
    return _mix(_mix((start + (position + 1) * _STRIDE) & _MASK))


def uniform(seed: int, position: int) -> float:
    """The draw as a float in [0, 1): a multiple of 2**-53, never 1.0."""
    return (bits(seed, position) >> 11) * 2.0**-53


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """``uniform`` of each pair, float64 [n]. Raises ValueError when the lengths differ."""
    return np.array([uniform(s, p) for s, p in zip(seeds, positions, strict=True)], dtype=np.float64)


def words(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int64]:
    """The leading 62 bits of each draw as two 31-bit words, high word first: int64 [n, 2].

    A float32 uniform has 24 bits, too coarse for a vocabulary of 262144; whole words keep every bit on a device
    without float64. Raises ValueError when the lengths differ.
    """
    mask = (1 << WORD_BITS) - 1
    drawn = [bits(s, p) >> 2 for s, p in zip(seeds, positions, strict=True)]
    return np.array([(d >> WORD_BITS, d & mask) for d in drawn], dtype=np.int64).reshape(len(drawn), 2)


def _mix(x: int) -> int:
    """A bijection of 64-bit integers in which every input bit flips each output bit half of the time."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
