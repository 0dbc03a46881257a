"""Packing to 8 or 4 bits and back in C, on all cores (packed.c). Evaluates what it is given. Engine thread only."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np

from millpond.native.decode import PackedAddresses
from millpond.native.library import prepared

TILE = 64
"""Positions whose keys are packed together; that of tiles.h."""


class Conversion(ctypes.Structure):
    """struct conversion of packed.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("bits", "unpacks")),
        *((name, ctypes.c_int64) for name in ("groups", "size")),
        ("floats", ctypes.c_void_p),
        ("packed", PackedAddresses),
        ("means", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
    )


def pack(array: mx.array, bits: int, size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Numbers uint32 [..., d * bits / 32], scales and biases float16 [..., d / size] of float32 [..., d]."""
    *outer, dims = array.shape
    numbers = blank((*outer, dims * bits // 32), mx.uint32)
    scales, biases = (blank((*outer, dims // size), mx.float16) for _ in range(2))
    _convert(array, (numbers, scales, biases), bits, size, unpacks=False)
    return numbers, scales, biases


def unpack(packed: tuple[mx.array, mx.array, mx.array], bits: int, size: int) -> mx.array:
    """The other way: float32 [..., d]."""
    *outer, words = packed[0].shape
    floats = blank((*outer, words * 32 // bits), mx.float32)
    _convert(floats, packed, bits, size, unpacks=True)
    return floats


def pack_tiles(keys: mx.array, bits: int, size: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The same of turned keys float32 [..., tiles * TILE, d], and float16 [..., tiles * TILE, d / TILE, rounded up]:
    the means of each tile, one after the other. See tiles.h."""
    *outer, dims = keys.shape
    numbers = blank((*outer, dims * bits // 32), mx.uint32)
    scales, biases = (blank((*outer, dims // size), mx.float16) for _ in range(2))
    means = blank((*outer, -(-dims // TILE)), mx.float16)
    floats = np.array(keys, order="C")  # they are overwritten
    _convert(floats, (numbers, scales, biases), bits, size, unpacks=False, means=means)
    return numbers, scales, biases, means


def unpack_tiles(packed: tuple[mx.array, mx.array, mx.array, mx.array], bits: int, size: int) -> mx.array:
    """The other way: keys as they were, float32 [..., tiles * TILE, d]."""
    numbers, scales, biases, means = packed
    *outer, words = numbers.shape
    floats = blank((*outer, words * 32 // bits), mx.float32)
    _convert(floats, (numbers, scales, biases), bits, size, unpacks=True, means=means)
    return floats


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Memory of MLX's that C may fill before anybody else sees it: fresh pages would cost more than the filling."""
    array = mx.zeros(shape, dtype=dtype)
    mx.eval(array)
    return array


def _convert(
    floats: mx.array | np.ndarray,
    packed: tuple[mx.array, mx.array, mx.array],
    bits: int,
    size: int,
    *,
    unpacks: bool,
    means: mx.array | None = None,
) -> None:
    library = prepared()
    assert library is not None
    # Without gaps; what is written to has none, and its memory is its own.
    floats_view, *views = (np.ascontiguousarray(np.asarray(array)) for array in (floats, *packed))
    addresses, groups = PackedAddresses(*(view.ctypes.data for view in views)), floats_view.size // size
    job = Conversion(bits, unpacks, groups, size, floats_view.ctypes.data, addresses)
    if means is not None:
        means_view = np.ascontiguousarray(np.asarray(means))
        job.means, job.dims = means_view.ctypes.data, floats_view.shape[-1]
    library.millpond_convert(ctypes.byref(job))
