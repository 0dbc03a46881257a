"""One layer of a transformer in C, as a step of MLX's own graph (layer.c). Engine thread only."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from millpond.native import carried
from millpond.native.decode import Slots
from millpond.native.products import FLOAT_BYTES, Matrix, Weights, address, weights_of

SILU, GELU = range(2)
"""How what is multiplied is gated; GELU is that by tanh."""


class _Norm(ctypes.Structure):
    """struct norm of layer.c."""

    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_double))


class _Matrix(ctypes.Structure):
    """struct matrix of products.h."""

    _fields_ = (("weights", Weights), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    """struct layer of layer.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "inner")),
        *((name, _Norm) for name in ("before", "attended", "between", "done", "queries", "keys")),
        *((name, _Matrix) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("turns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rotated", "kind")),
    )


class _Prompt(ctypes.Structure):
    """struct prompt of layer.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "before", "capacity")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class _Reading(ctypes.Structure):
    """struct reading of layer.c, between its layer and its prompts."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("prompts", "length", "heads", "groups", "dims", "value_dims")),
        ("scale", ctypes.c_double),
    )


@dataclass(frozen=True)
class Filling:
    """A prompt's cache in one layer, which ``count`` new tokens go into behind ``before`` others; float32, [1, groups,
    capacity, x] each, evaluated and without gaps. What is told of it is good for as long as the arrays stay where they
    are."""

    count: int
    before: int
    keys: mx.array
    values: mx.array


@dataclass(frozen=True)
class Norm:
    """The root of the mean square divides; evaluated, float32."""

    weight: mx.array
    eps: float


@dataclass(frozen=True)
class Layer:
    """What a layer computes: norm, products, heads' norms, rotation, attention, product, norm, sum; norm, products,
    gate, product, norm, sum. What may be missing is None."""

    before: Norm
    between: Norm
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    attended: Norm | None = None
    done: Norm | None = None
    queries: Norm | None = None
    keys: Norm | None = None
    kind: int = SILU


def described(layer: Layer, turns: mx.array, rotated: int) -> bytes:
    """What C is told of it; good for as long as the arrays stay where they are. ``turns``: float32 [positions,
    rotated], cosines and then sines of each position."""
    told = _Layer(hidden=layer.before.weight.size, inner=layer.down.weight.shape[0], rotated=rotated, kind=layer.kind)
    for name in ("before", "attended", "between", "done", "queries", "keys"):
        norm: Norm | None = getattr(layer, name)
        if norm is not None:
            setattr(told, name, _Norm(address(norm.weight), norm.eps))
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        matrix: Matrix = getattr(layer, name)
        bias = None if matrix.bias is None else address(matrix.bias)
        setattr(told, name, _Matrix(weights_of(matrix), bias))
    told.inner = told.gate.weights.outputs
    told.turns = address(turns)
    return bytes(told)


def fits(hidden: int, parts: int, nbytes: int) -> bool:
    """Whether vectors of so many numbers can carry what is told of ``parts`` layers, ``nbytes`` in all."""
    return carried.BEGIN_BYTES + 8 * (1 + parts) + nbytes <= hidden * hidden * FLOAT_BYTES


def told_bytes(lengths: bytes) -> int:
    """Of one layer, in a step of rows of such ``lengths``."""
    return ctypes.sizeof(_Layer) + ctypes.sizeof(Slots) + len(lengths)


def fits_prompts(hidden: int, prompts: int) -> bool:
    """The same of so many prompts."""
    told = ctypes.sizeof(_Layer) + ctypes.sizeof(_Reading) + prompts * ctypes.sizeof(_Prompt)
    return carried.BEGIN_BYTES + told <= hidden * hidden * FLOAT_BYTES


@functools.lru_cache(maxsize=64)
def _side(hidden: int, content: int) -> int:
    """Rows and columns of the smallest matrix that holds so many bytes and can be multiplied with any such vectors."""
    return next(side for side in range(1, hidden + 1) if hidden % side == 0 and side * side * FLOAT_BYTES >= content)


def run(parts: Sequence[bytes], x: mx.array) -> mx.array:
    """What layers, one after the other, make of x float32 [n, L, hidden], lazily. Of each: what ``described`` gives,
    then its slots and their lengths, see decode.attend, but for the beginning of these."""
    sizes = bytes((ctypes.c_int64 * (1 + len(parts)))(len(parts), *map(len, parts)))
    return _carried(b"".join([carried.begin(carried.LAYERS), sizes, *parts]), x)


def read(told: bytes, prompts: Sequence[Filling], heads: int, scale: float, x: mx.array) -> mx.array:
    """The same of x float32 [prompts, L, hidden], new tokens of prompts, filled up to the longest; ``scale``: of scores
    whose softmax is to the base of 2. Keys and values are written when it is evaluated."""
    _, groups, _, dims = prompts[0].keys.shape
    value_dims = prompts[0].values.shape[-1]
    reading = _Reading(len(prompts), x.shape[1], heads, groups, dims, value_dims, scale)
    caches = [
        _Prompt(one.count, one.before, one.keys.shape[2], address(one.keys), address(one.values)) for one in prompts
    ]
    return _carried(carried.begin(carried.READING) + told + bytes(reading) + b"".join(map(bytes, caches)), x)


def _carried(content: bytes, x: mx.array) -> mx.array:
    side = _side(x.shape[-1], len(content))
    left = mx.array(np.frombuffer(content.ljust(side * side * FLOAT_BYTES, b"\0"), np.float32).reshape(side, side))
    return (left @ x.reshape(side, -1)).reshape(x.shape)
