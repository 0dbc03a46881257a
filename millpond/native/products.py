"""Products with weights as they are on disk, in C, as a step of MLX's own graph (products.c)."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from millpond.native import carried, decode
from millpond.native.decode import PackedAddresses

SIDE = 16
"""Rows and columns of what stands for experts."""
SHARES = (64, 32, 16, 8, 4, 2, 1)
E2M1, E4M3, BRAINS, HALVES, FLOATS, POWERS = range(16, 22)
"""enum format of kernels.h; affine formats are called by their bits."""
TYPES = {mx.float32: FLOATS, mx.float16: HALVES, mx.bfloat16: BRAINS}
MODES = {"mxfp4": (E2M1, POWERS), "nvfp4": (E2M1, E4M3), "mxfp8": (E4M3, POWERS)}
HALF = (mx.float16, mx.bfloat16)
FLOAT_BYTES = 4
STEP = 32
"""Inputs of weights without groups come in multiples of this."""


class Weights(ctypes.Structure):
    """struct weights of kernels.h."""

    _fields_ = (
        ("packed", PackedAddresses),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "group")),
        *((name, ctypes.c_int32) for name in ("format", "scale_type")),
    )


MOST_FLOATS = 1 << 14
"""Of what stands for weights, where it could be smaller."""
LEAST_BYTES = carried.BEGIN_BYTES + 2 * ctypes.sizeof(ctypes.c_int64) + ctypes.sizeof(Weights)
"""What a matrix has to hold that stands for weights."""


@functools.cache
def available() -> bool:
    """Whether this process can do it: tried once, because it depends on how MLX computes a product."""
    if not decode.available():
        return False
    weight = mx.arange(1, 2 * STEP + 1).reshape(2, STEP).astype(mx.float16)
    x = mx.array([[1.0] * STEP, [0.0] * (STEP - 1) + [0.5]])
    return (
        mx.array_equal(product(stand_in(Matrix(weight)), x), mx.array([[528.0, 1552.0], [16.0, 32.0]])).item() is True
    )


def fits(outputs: int, inputs: int) -> bool:
    """Whether a matrix of so many numbers can stand for weights of that shape."""
    return inputs % STEP == 0 and outputs * inputs * FLOAT_BYTES >= LEAST_BYTES


@dataclass(frozen=True)
class Matrix:
    """Weights [outputs, inputs], or [experts, outputs, inputs], as MLX has packed them, or of 16 or 32 bits."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group: int = 0
    bits: int = 0
    mode: str = "affine"
    bias: mx.array | None = None
    """float32 [outputs]: what is added to a product. Only in a layer of its own."""
    first: int = 0
    end: int | None = None
    """Which outputs are meant. Only in a layer of its own."""

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[-1] if self.scales is None else self.scales.shape[-1] * self.group)

    @property
    def outputs(self) -> int:
        return len(range(int(self.weight.shape[-2]))[self.first : self.end])


def address(array: mx.array) -> int:
    """Where an array without gaps lies, once it is evaluated. Raises ValueError for another."""
    mx.eval(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    place = np.asarray(array).__array_interface__
    if place["strides"] is not None:
        raise ValueError("weights must be arrays without gaps")
    return int(place["data"][0])


def weights_of(matrix: Matrix) -> Weights:
    """What C is told of them; of experts, of the first. Raises ValueError for those that it cannot multiply with."""
    if matrix.inputs % STEP:
        raise ValueError(f"the number of inputs must be a multiple of {STEP}, got {matrix.inputs}")
    if matrix.scales is None:
        form, scale_type, group = TYPES[matrix.weight.dtype], FLOATS, matrix.inputs
    elif matrix.mode == "affine":
        form, scale_type, group = matrix.bits, TYPES[matrix.scales.dtype], matrix.group
    else:
        form, scale_type = MODES[matrix.mode]
        group = matrix.group
    arrays = [array for array in (matrix.weight, matrix.scales, matrix.biases) if array is not None]
    rows = int(matrix.weight.shape[-2])
    places = PackedAddresses(*(address(array) + matrix.first * (array.nbytes // rows) for array in arrays))
    return Weights(places, matrix.inputs, matrix.outputs, group, form, scale_type)


@dataclass(frozen=True)
class StandIn:
    """What stands for weights in ``product``, or those of experts in ``gathered``; good for as long as their arrays
    stay where they are."""

    array: mx.array
    outputs: int
    numbered: bool
    """Whether each result says whose it is: of experts, and of weights for which nothing else small can stand."""


def stand_in(matrix: Matrix) -> StandIn:
    """For weights that lie where they will stay."""
    weights, (*experts, _, _) = weights_of(matrix), matrix.weight.shape
    inputs, outputs = matrix.inputs, matrix.outputs
    share, shape = 0, (SIDE, SIDE)
    if not experts:
        common = (share for share in SHARES if inputs % share == outputs % share == 0)
        share = next(s for s in common if inputs // s * (outputs // s) * FLOAT_BYTES >= LEAST_BYTES)
        if share < SHARES[0] and inputs // share * (outputs // share) > MOST_FLOATS:
            share, experts = 0, [1]
        else:
            shape = (outputs // share, inputs // share)
    content = carried.begin(carried.WEIGHTS) + bytes((ctypes.c_int64 * 2)(share, *experts)) + bytes(weights)
    floats = np.frombuffer(content.ljust(shape[0] * shape[1] * FLOAT_BYTES, b"\0"), np.float32)
    return StandIn(mx.array(floats.reshape(shape)), outputs, bool(experts))


def product(stands: StandIn, x: mx.array) -> mx.array:
    """x float32 [..., inputs] -> [..., outputs]."""
    shape = (*x.shape[:-1], stands.outputs)
    if stands.numbered:
        return gathered(stands, x.reshape(-1, x.shape[-1]), mx.zeros((x.size // x.shape[-1],), mx.uint32)).reshape(
            shape
        )
    return (stands.array @ x.reshape(stands.array.shape[1], -1)).reshape(shape)


def gathered(stands: StandIn, x: mx.array, experts: mx.array) -> mx.array:
    """x float32 [vectors, inputs] and uint32 [results], each vector's results one after the other -> [results,
    outputs]."""
    results, outputs = int(experts.size), stands.outputs
    counts = mx.array(np.array([x.shape[0], results], np.int64).view(np.float32))
    given = [counts, x.reshape(-1), experts.astype(mx.uint32).view(mx.float32).reshape(-1)]
    total, size = sum(int(array.size) for array in given), results * outputs
    columns = -(-max(total, size) // SIDE)
    if spare := SIDE * columns - total:
        given.append(mx.zeros((spare,)))
    return (stands.array @ mx.concatenate(given).reshape(SIDE, columns)).reshape(-1)[:size].reshape(results, outputs)
