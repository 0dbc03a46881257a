"""What the tokens of a forward make of the states of a recurrent layer, in C (recurrence.c). Engine thread only."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from millpond.native import carried, decode

COLUMNS = 64
"""Tokens of one job: what it is given is copied together, and longer ones would take more memory."""
SIDES = tuple(16 << power for power in range(10))
"""Of the left matrix, which is square, so that the product has as many numbers as the states. These divide most."""


class Recurrent(ctypes.Structure):
    """struct recurrent of recurrence.c."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("rows", "columns", "key_heads", "heads", "keys", "values", "apart", "corrects", "masked")
    )


@dataclass(frozen=True)
class Given:
    """Of n rows and L tokens of each, float32."""

    queries: mx.array
    """[n, L, G, K], what reads the state."""
    keys: mx.array
    """[n, L, G, K], where values are taken up."""
    values: mx.array
    """[n, L, H, V]; each key head is that of H / G neighbours."""
    decays: mx.array
    """[n, L, H], or [n, L, H, K] where each number of a key decays by itself."""
    shares: mx.array | None = None
    """[n, L, H]: such a part of what the value is beyond what the state says is added. None: the value is."""
    counted: mx.array | None = None
    """[n, L]: tokens with 0 change nothing, and read 0. None: all count."""

    def fits(self, state: mx.array) -> bool:
        """Whether all shapes and types are those that are said here, beside states [n, H, V, K]."""
        n, heads, values, size = state.shape
        _, length, groups, _ = self.keys.shape
        apart = (size,) if self.decays.ndim == 4 else ()
        expected = (
            (self.queries, (n, length, groups, size)),
            (self.keys, (n, length, groups, size)),
            (self.values, (n, length, heads, values)),
            (self.decays, (n, length, heads, *apart)),
            (self.shares, (n, length, heads)),
            (self.counted, (n, length)),
        )
        given = [(array, shape) for array, shape in expected if array is not None]
        return (
            all(array.shape == shape for array, shape in given)
            and all(array.dtype == mx.float32 for array in (state, *(array for array, _ in given)))
            and 0 < groups <= heads
            and heads % groups == 0
        )

    def arrays(self, first: int, end: int) -> list[mx.array]:
        """Those of tokens [first, end), in the order that C takes."""
        given = (self.queries, self.keys, self.values, self.decays, self.shares, self.counted)
        return [array[:, first:end] for array in given if array is not None]


@functools.cache
def available() -> bool:
    """Whether this process can do it: tried once, because it depends on how MLX computes a product."""
    if not decode.available():
        return False
    rng = np.random.default_rng(0)
    n, length, groups, heads, keys, values = 2, 3, 1, 2, 5, 3  # so many states that they are filled up
    q, k = rng.standard_normal((2, n, length, groups, keys)).astype(np.float32)
    v = rng.standard_normal((n, length, heads, values)).astype(np.float32)
    decays, shares = rng.random((2, n, length, heads)).astype(np.float32)
    counted = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    state = rng.standard_normal((n, heads, values, keys)).astype(np.float32)
    read, after = recurrent(mx.array(state), Given(*map(mx.array, (q, k, v, decays, shares, counted))))
    expected = np.zeros_like(v)
    for row, token in zip(*np.nonzero(counted), strict=True):
        for head in range(heads):
            key, now = k[row, token, 0], state[row, head]
            now *= decays[row, token, head]
            now += np.outer(shares[row, token, head] * (v[row, token, head] - now @ key), key)
            expected[row, token, head] = now @ q[row, token, 0]
    return np.allclose(read, expected, atol=1e-4) and np.allclose(after, state, atol=1e-4)


def recurrent(state: mx.array, given: Given) -> tuple[mx.array, mx.array]:
    """What was read [n, L, H, V], and the states [n, H, V, K] float32 behind the last token, lazily. Raises ValueError
    for shapes that do not go together."""
    if not given.fits(state):
        raise ValueError(f"states {state.shape} do not fit what is given: {[one.shape for one in given.arrays(0, 1)]}")
    read, length = [], given.values.shape[1]
    for first in range(0, length, COLUMNS):
        one, state = _carried(state, given, first, min(first + COLUMNS, length))
        read.append(one)
    return (read[0] if len(read) == 1 else mx.concatenate(read, axis=1)), state


def _carried(state: mx.array, given: Given, first: int, end: int) -> tuple[mx.array, mx.array]:
    n, heads, values, keys = state.shape
    shape = (n, end - first, heads, values)
    job = Recurrent(
        *(n, end - first, given.keys.shape[2], heads, keys, values),
        *(given.decays.ndim == 4, given.shares is not None, given.counted is not None),
    )
    described = np.frombuffer(carried.begin(carried.RECURRENCE) + bytes(job), np.float32)
    parts = [mx.array(described), *(array.reshape(-1) for array in given.arrays(first, end))]
    total = sum(int(part.size) for part in parts)
    side = next(side for side in SIDES if side * side >= total)
    if spare := side * side - total:
        parts.append(mx.zeros((spare,)))
    left, right = mx.concatenate(parts), state.reshape(-1)
    if spare := -right.size % side:
        right = mx.pad(right, (0, spare))
    after = (left.reshape(side, side) @ right.reshape(side, -1)).reshape(-1)[: state.size].reshape(state.shape)
    # C writes over the values, which nobody else has.
    (written,) = mx.depends([left], [after])
    place = sum(int(part.size) for part in parts[:3])
    return written[place : place + math.prod(shape)].reshape(shape), after
