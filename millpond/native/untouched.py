"""Zeros whose memory is taken, and not touched: the system gives a page of it when somebody first writes there.

Room for keys and values is made for more rows and positions than there are. Filling gigabytes of it with zeros that
nobody reads would hold up everybody's next token.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from millpond.native import carried, decode
from millpond.native.library import prepared
from millpond.native.products import address

ROWS = 64
"""Of the product that takes the memory; floats of an array are a multiple of it."""
LEAST_BYTES = 1 << 18
"""Smaller ones are filled sooner."""


@functools.cache
def _available() -> bool:
    """Whether this process can do it: tried once, because it depends on how MLX computes a product."""
    return decode.available() and not mx.any(_taken(LEAST_BYTES, mx.ones)).item()


def _taken(nbytes: int, right: Callable[[tuple[int, int]], mx.array] = mx.zeros) -> mx.array:
    """So many zeros of float32, in a row. ``right``: what an uncarried product would multiply with."""
    told = carried.begin(carried.ZEROS) + bytes(ctypes.c_int64(nbytes))
    left = np.frombuffer(told.ljust(4 * ROWS, b"\0"), np.float32)
    return (mx.array(left)[:, None] @ right((1, nbytes // 4 // ROWS))).reshape(-1)


def touch(array: mx.array, first: int, count: int) -> None:
    """Have the system give the memory of ``count`` bytes from ``first`` on of an evaluated array, if it has not. Where
    that cannot be asked for, whoever writes there waits for it."""
    library = prepared()
    if library is not None and count:
        library.millpond_touch(ctypes.c_void_p(address(array) + first), ctypes.c_size_t(count))


def zeros(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    """As ``mx.zeros``, lazily, and of large arrays the memory is not touched where C can see to that."""
    nbytes = math.prod(shape) * dtype.size
    if nbytes < LEAST_BYTES or nbytes % (4 * ROWS) or not _available():
        return mx.zeros(shape, dtype)
    return _taken(nbytes).view(dtype).reshape(shape)
