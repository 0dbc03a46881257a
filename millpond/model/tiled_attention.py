"""Attention of many queries at once on a Linux CPU, in C and on all cores (native/attention.c).

It reads and writes MLX's own memory, so the graph is evaluated up to here at each call: in a prompt chunk that costs
nothing, in a decode step it would. Engine thread only.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from millpond.model.upstream import Mask
from millpond.native.library import prepared

TILED_QUERIES = 16
"""Fewer are left to MLX: decode steps, and drafts being verified, stay lazy."""


class View(ctypes.Structure):
    """An array in memory: element [b, h, i, j] is at base + b * step[0] + h * step[1] + i * step[2] + j."""

    _fields_ = (("base", ctypes.c_void_p), ("step", ctypes.c_int64 * 3))


class Attention(ctypes.Structure):
    """struct attention of attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "length", "width", "dims", "value_dims")),
        *((name, View) for name in ("queries", "keys", "values", "mask")),
        ("result", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


def tiled(mask: Mask, *arrays: mx.array) -> bool:
    """Whether attention with this mask over these arrays can be computed here: C reads float32 and nothing else."""
    plain = mask is None or isinstance(mask, str) or mask.dtype == mx.bool_
    return plain and all(array.dtype == mx.float32 for array in arrays) and prepared() is not None


def tiled_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Softmax to the base of 2 of scale * queries . keys, times values; shapes as for ``cpu_math.attention``."""
    library = prepared()
    assert library is not None
    n, heads, length, dims = queries.shape
    groups, width = keys.shape[1:3]
    mx.eval(queries, keys, values, *([mask] if isinstance(mask, mx.array) else []))
    sources = [_rows(array) for array in (queries, keys, values)]
    result = np.empty((n, length, heads, values.shape[-1]), np.float32)
    seen = View()
    if isinstance(mask, mx.array):
        sources.append(np.broadcast_to(_rows(mask), (n, heads, length, width)))
        seen = _view(sources[-1])
    job = Attention(
        *(n, heads, groups, length, width, dims, values.shape[-1]),
        *(_view(source) for source in sources[:3]),
        seen,
        result.ctypes.data,
        scale,
        mask == "causal" if isinstance(mask, str) else False,
    )
    library.millpond_attention(ctypes.byref(job))
    return mx.array(result).transpose(0, 2, 1, 3)


def _rows(array: mx.array) -> NDArray[np.generic]:
    """The array's own memory; a copy only if elements of a row are not neighbours."""
    view = np.asarray(array)
    return view if view.strides[-1] == view.itemsize or view.shape[-1] == 1 else np.ascontiguousarray(view)


def _view(array: NDArray[np.generic]) -> View:
    steps = [stride // array.itemsize for stride in array.strides[:3]]
    return View(array.ctypes.data, (ctypes.c_int64 * 3)(*steps))
