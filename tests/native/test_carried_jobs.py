"""Calls of the attention in C travel through MLX as products: what is such a call, and what merely looks like one."""

from __future__ import annotations

import pytest

from millpond.native.library import prepared

if prepared() is None:
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

import ctypes

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from slot_story import Floats, Layer, Past, drawn, expected, filled, forward

from millpond.kv.arena import Arena
from millpond.native import carried, decode

LAYER = Layer()


def job_matrix(arena: Arena) -> Floats:
    """The left matrix that asks for one token in each row of an arena."""
    (slot,) = arena.begin(1)
    asked = slot._job((len(arena.lengths), LAYER.heads, LAYER.groups, 1), 1.0, True)
    room = decode.SIDE * decode.SIDE * 4
    return np.frombuffer((asked + slot.forward.packed_lengths).ljust(room, b"\0"), np.float32).reshape(32, 32)


def arguments(new: list[Past], queries: Floats, result: int) -> Floats:
    """The right matrix, columns enough for the result too."""
    flat = np.concatenate([queries.ravel(), *(p.keys.ravel() for p in new), *(p.values.ravel() for p in new)])
    columns = -(-max(flat.size, result) // 32)
    return np.concatenate([flat, np.zeros(32 * columns - flat.size, np.float32)]).reshape(32, columns)


def multiplied(left: mx.array, right: mx.array) -> npt.NDArray[np.float64]:
    product: npt.NDArray[np.float64] = np.array(left).astype(np.float64) @ np.array(right).astype(np.float64)
    return product


def test_the_job_matrix_is_a_job() -> None:
    """Else the tests below would prove nothing."""
    arena, new, queries = filled(LAYER, 30, 63)
    right = arguments(new, queries, 2 * LAYER.heads * LAYER.value_dim)
    by_hand = mx.array(job_matrix(arena)) @ mx.array(right)
    mx.eval(by_hand)
    assert np.array_equal(np.array(arena.slots[0].span(1, 63, 64, 64)[0])[0], new[1].keys)


@pytest.mark.parametrize("byte", [0, 1, 15, 31])
def test_a_wrong_password_is_a_product(byte: int) -> None:
    arena, new, queries = filled(LAYER, 30, 63)
    raw = bytearray(job_matrix(arena).tobytes())
    raw[byte] ^= 1
    left = mx.array(np.frombuffer(bytes(raw), np.float32).reshape(32, 32))
    right = mx.array(arguments(new, queries, 2 * LAYER.heads * LAYER.value_dim))
    before = [np.array(array) for array in arena.arrays()]
    product = np.array(left @ right)
    assert all(np.array_equal(was, array) for was, array in zip(before, arena.arrays(), strict=True))
    # The first rows are made of addresses and chance, and may be anything; those of zeros tell.
    assert np.array_equal(product[16:], np.zeros_like(product[16:]))


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (8, 8)])
@pytest.mark.parametrize("number", [-1, len(carried.JOBS), 1 << 40])
def test_what_names_no_job_is_a_product_whatever_it_begins_with(shape: tuple[int, int], number: int) -> None:
    rng = np.random.default_rng(6)
    arena, _, _ = filled(LAYER, 30)
    left = rng.standard_normal(shape).astype(np.float32)
    left.ravel()[:8] = job_matrix(arena).ravel()[:8]
    left.ravel()[8:10] = np.array([number], np.int64).view(np.float32)
    right = rng.standard_normal((shape[1], 12)).astype(np.float32)
    product = np.array(mx.array(left) @ mx.array(right))
    assert np.allclose(product[2:], left[2:] @ right, atol=1e-4)  # the others are made of chance
    assert product.shape == (shape[0], 12)


def test_what_has_no_room_for_a_job_is_a_product() -> None:
    arena, _, _ = filled(LAYER, 30)
    left = job_matrix(arena).ravel()[:10].reshape(2, 5)
    right = np.ones((5, 12), np.float32)
    assert np.allclose(np.array(mx.array(left) @ mx.array(right))[1], left[1].sum(), atol=1e-4, equal_nan=True)


def test_a_part_of_a_wider_matrix_is_a_product() -> None:
    """MLX never passes one on, others might."""
    rng = np.random.default_rng(6)
    arena, _, _ = filled(LAYER, 30)
    left, right = (rng.standard_normal((32, columns)).astype(np.float32) for columns in (64, 12))
    left[0, :8] = job_matrix(arena).ravel()[:8]
    product, library = np.zeros((32, 12), np.float32), prepared()
    assert library is not None
    library.cblas_sgemm(
        *(101, 111, 111, 32, 12, 32, ctypes.c_float(1.0), ctypes.c_void_p(left.ctypes.data), 64),
        *(ctypes.c_void_p(right.ctypes.data), 12, ctypes.c_float(0.0), ctypes.c_void_p(product.ctypes.data), 12),
    )
    assert np.allclose(product[1:], left[1:, :32] @ right, atol=1e-4)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("columns", [1, 5, 32, 300])
def test_square_matrices_are_products(side: int, columns: int) -> None:
    rng = np.random.default_rng(7)
    left, right = (mx.array(rng.standard_normal((side, n)).astype(np.float32)) for n in (side, columns))
    assert np.allclose(np.array(left @ right), multiplied(left, right), atol=1e-4)
    assert np.allclose(np.array(left.T @ right), multiplied(left.T, right), atol=1e-4)


@pytest.mark.parametrize("rows", [600, 2100])
def test_many_rows_need_a_larger_matrix(rows: int) -> None:
    """Their lengths have to fit in it: 600 rows do not fit in the smallest, 2100 not in the next."""
    layer = Layer(groups=1, sharing=1, key_dim=8, value_dim=8)
    arena, new, queries = filled(layer, *([1] * rows))
    result = np.array(forward(arena, new, queries))
    rng = np.random.default_rng(4)
    for row, past in enumerate([drawn(layer, rng, 1) for _ in range(rows)]):
        assert np.allclose(result[row], expected(layer, past.followed_by(new[row]), queries[row]), atol=1e-5)


def test_slots_with_gaps_are_refused() -> None:
    whole = mx.zeros((2, 3, 8, 16))
    gaps = [whole[:, :, :4], whole[:, :2], whole[:1, :, 1:5], whole.swapaxes(1, 2), whole[..., :8]]
    for array in [*gaps, mx.broadcast_to(mx.zeros((1, 3, 8, 16)), (2, 3, 8, 16))]:
        with pytest.raises(ValueError, match="without gaps"):
            decode.store([array], decode.FLOAT_BITS, 0)
    arena, new, queries = filled(LAYER, 3, 4)
    segment = arena.slots[0].segments[0]
    keys, values = segment.arrays
    segment.arrays = [keys, mx.concatenate([values] * 2, axis=3)[..., ::2]]
    with pytest.raises(ValueError, match="without gaps"):
        forward(arena, new, queries)
