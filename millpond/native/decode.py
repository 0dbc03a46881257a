"""Attention over slots in C, as a step of MLX's own graph (decode.c).

The call is carried as a matrix product: nothing is read or written before MLX evaluates it, in its own thread, and then
in place. So the slots' memory must neither move nor go away until the forward has been evaluated. Engine thread only.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from millpond.native import carried, device
from millpond.native.library import prepared

SIDE = 32
"""Rows and columns of the left matrix; more when there are many rows to tell of."""
FLOAT_BITS = 32


class PackedAddresses(ctypes.Structure):
    """struct packed of kernels.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("numbers", "scales", "biases"))


class Store(ctypes.Structure):
    """struct store of decode.c."""

    _fields_ = (
        ("packed", PackedAddresses),
        ("means", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class Slots(ctypes.Structure):
    """struct slots of decode.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "groups", "length", "dims", "value_dims")),
        *((name, ctypes.c_int64) for name in ("window", "exact", "tiled")),
        *((name, Store * 3) for name in ("keys", "values")),
        ("scale", ctypes.c_double),
        ("writes", ctypes.c_int64),
    )


Stores = Sequence[Store | None]
"""Those of the first positions, of the others, and of the newest: the last of them may be missing."""


@functools.cache
def available() -> bool:
    """Whether this process can do it: tried once, because it depends on how MLX computes a product."""
    if prepared() is None or not device.on_cpu():
        return False
    keys, values = (mx.zeros((1, 1, 4, 8)) for _ in range(2))
    mx.eval(keys, values)
    stores = [store([array], FLOAT_BITS, 0) for array in (keys, values)]
    asked = job((1, 1, 1, 1), (8, 8), (None, stores[0]), (None, stores[1]), writes=True)
    new = mx.ones((1, 1, 1, 8))
    result = attend(asked, bytes(8), new, (new, 3 * new), 8)
    return bool(mx.all(result == 3.0).item()) and bool((keys[0, 0, 0] == 1.0).all().item())


def store(arrays: Sequence[mx.array], bits: int, group: int) -> Store:
    """Evaluated arrays [rows, heads, capacity, x]: floats alone, or packed numbers, scales and biases, and the means of
    tiles."""
    places = [np.asarray(array).__array_interface__ for array in arrays]
    if any(place["strides"] is not None for place in places):
        raise ValueError("slots must be arrays without gaps")
    numbers, *rest = (place["data"][0] for place in places)
    scales, biases, means = [*rest, 0, 0, 0][:3]
    return Store(PackedAddresses(numbers, scales, biases), means, arrays[0].shape[2], bits, group)


def job(
    shape: tuple[int, int, int, int],
    dims: tuple[int, int],
    keys: Stores,
    values: Stores,
    *,
    scale: float = 1.0,
    exact: int = 0,
    window: int = 0,
    writes: bool,
) -> bytes:
    """What ``attend`` is to do; good for as long as the stores' arrays stay where they are.

    ``shape``: rows, query heads, key heads, new tokens; ``dims``: those of a key and of a value. The first store
    has positions below ``exact``, the second the others, as a ring when there is a ``window``; where there is a third
    one, the second has whole tiles only, and that is a ring of the newest positions. ``scale``: that of the scores,
    whose softmax is to the base of 2.
    """
    tiled = len(keys) > 2
    stores = ((Store * 3)(*(one or Store() for one in side)) for side in (keys, values))
    return carried.begin(carried.ATTENTION) + bytes(Slots(*shape, *dims, window, exact, tiled, *stores, scale, writes))


def attend(
    asked: bytes, lengths: bytes, queries: mx.array, new: tuple[mx.array, mx.array] | tuple[()], value_dim: int
) -> mx.array:
    """Write ``new`` keys and values [n, G, L, D] behind the ``lengths`` (int64) of the rows, then attend: queries
    [n, H, L, D] float32 -> [n, H, L, value_dim], lazily. ``asked``: see ``job``. With a third store the lengths are
    followed by where the newest positions of each row begin, and by where they began in the forward before."""
    n, heads, length, _ = queries.shape
    given = [array.reshape(-1) for array in (queries, *new)]
    total, size = sum([int(array.size) for array in given]), n * heads * length * value_dim
    side = SIDE
    while side * side * 4 < len(asked) + len(lengths):
        side *= 2
    columns = -(-max(size, total) // side)
    if spare := side * columns - total:
        given.append(mx.zeros((spare,)))
    left = mx.array(np.frombuffer((asked + lengths).ljust(side * side * 4, b"\0"), np.float32).reshape(side, side))
    result = (left @ mx.concatenate(given).reshape(side, columns)).reshape(-1)[:size]
    return result.reshape(n, length, heads, value_dim).transpose(0, 2, 1, 3)
