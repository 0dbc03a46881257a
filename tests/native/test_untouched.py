"""Zeros that take no memory until somebody writes there (R4)."""

from __future__ import annotations

import ctypes
import resource

import mlx.core as mx
import numpy as np
import pytest

from millpond.kv.arena import Arena
from millpond.kv.format import KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.slots import KvSpec
from millpond.native import decode
from millpond.native.products import address
from millpond.native.untouched import LEAST_BYTES, touch, zeros
from millpond.types import KvPacking

if not decode.available():
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

LARGE = 64 * LEAST_BYTES
TYPES = (mx.float32, mx.bfloat16, mx.float16, mx.uint32)


def in_memory(array: mx.array) -> int:
    """Its bytes that are, rounded to pages."""
    page = resource.getpagesize()
    first = address(array) // page * page
    pages = -(-(address(array) + array.nbytes - first) // page)
    found = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * page), found) == 0
    return page * sum(one & 1 for one in found)


def faults() -> int:
    """Pages that had to be waited for."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 1000, 64), (1, 2, 4099, 64), (LEAST_BYTES + 1,), (0, 4)])
def test_they_are_zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Also where something else has just stood."""
    ones = mx.ones(shape, dtype)
    mx.eval(ones)
    del ones
    found = zeros(shape, dtype)
    assert (found.shape, found.dtype) == (shape, dtype)
    assert mx.array_equal(found, mx.zeros(shape, dtype))


def test_memory_comes_with_what_is_written() -> None:
    found = zeros((1, 4, LARGE // 4 // 4 // 64, 64))
    mx.eval(found)
    assert found.nbytes == LARGE
    assert in_memory(found) < LARGE / 64
    place = address(found)
    found[:, :1] = 1.0
    mx.eval(found)
    assert address(found) == place, "written in place"
    assert LARGE / 4 <= in_memory(found) < LARGE * 7 / 16
    touch(found, LARGE // 2, LARGE // 4)
    assert LARGE / 2 <= in_memory(found) < LARGE * 3 / 4
    assert mx.array_equal(mx.sum(found), mx.array(LARGE / 4 / 4))


def test_who_is_not_asked_leaves_everything_alone() -> None:
    found = mx.arange(LEAST_BYTES)
    mx.eval(found)
    touch(found, 12345, 100_000)
    touch(found, 0, 0)
    assert np.array_equal(np.array(found), np.arange(LEAST_BYTES))


@pytest.mark.parametrize("packing", [KvPacking(), KvPacking(bits=8)], ids=str)
def test_a_row_has_its_memory_when_it_comes(packing: KvPacking) -> None:
    """Room is made for many positions, nobody waits for all of it, and whoever joins does not wait for the system."""
    form = KvFormat(packing, native=True)
    spec = KvSpec(8, 64, 64, mx.float32, form)
    arena, length = Arena([spec] * 4), 3000
    arena.put("first", [leaf(form, 10)] * 4, 10)
    needed, row = 4 * length * spec.token_bytes, [leaf(form, length)] * 4
    for quarter in range(1, 5):
        arena.reserve(length, quarter / 4)
    assert arena.nbytes > 2.5 * needed
    held = sum(in_memory(array) for slot in arena.slots for array in slot.arrays)
    assert needed <= held < 0.75 * arena.nbytes, "for those who come, not for all that room is made for"
    before = faults()
    arena.put("second", row, length)
    assert faults() - before < needed / resource.getpagesize() / 4


def leaf(form: KvFormat, length: int) -> LeafRow:
    keys, values = (mx.random.normal((1, 8, length, 64)) for _ in range(2))
    arrays = form.pack(keys, values) if form.packs else (keys, values)
    mx.eval(arrays)
    return LeafRow(arrays)
