"""Packing in C against its formula in numpy, and unpacking against MLX's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from millpond.native.library import prepared

if prepared() is None:
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.kv.format import KvFormat, turned
from millpond.native.packing import TILE, pack, pack_tiles, unpack, unpack_tiles
from millpond.types import KvPacking

Floats = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]
Packed = tuple[mx.array, mx.array, mx.array]
LARGEST = 65504.0
"""Of half precision: the largest scale, and the largest bias either way."""
ULP = 2.0**-10
"""The most by which neighbouring halves differ, relative to the smaller; below 2^-14 they are SMALLEST apart."""
SMALLEST = 2.0**-24
LAYOUTS = [(dims, size) for dims in (64, 96, 128, 256) for size in (32, 64, 128) if dims % size == 0]
GROUPS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.floating]]] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "wide": lambda rng, size: rng.standard_normal(size) * 10.0 ** rng.integers(-6, 5, size),
    "far from zero": lambda rng, size: 1000 + rng.uniform(-0.5, 0.5, size),
    "far below zero": lambda rng, size: -1000 + rng.uniform(-0.5, 0.5, size),
    "negative": lambda rng, size: -np.abs(rng.standard_normal(size)) * 50 - 3,
    "constant": lambda rng, size: np.full(size, rng.standard_normal() * 10.0 ** rng.integers(-5, 5)),
    "zero": lambda _, size: np.zeros(size),
    "minus zero": lambda _, size: np.full(size, -0.0),
    "an outlier": lambda rng, size: np.where(np.arange(size) == size // 2, 300.0, rng.standard_normal(size)),
    "tiny": lambda rng, size: rng.standard_normal(size) * 1e-8,
    "subnormal halves": lambda rng, size: rng.integers(-1023, 1024, size) * SMALLEST,
    "beside subnormal halves": lambda rng, size: np.nextafter(
        np.float32(rng.integers(1, 1024, size) * SMALLEST), np.float32(rng.choice([-1, 1]))
    ),
    "subnormal floats": lambda rng, size: rng.standard_normal(size) * 1e-40,
    "the largest halves": lambda rng, size: rng.uniform(-LARGEST, LARGEST, size),
    "a little beyond halves": lambda rng, size: rng.uniform(-90000, 90000, size),
    "huge": lambda rng, size: rng.standard_normal(size) * 1e30,
    "huge and positive": lambda rng, size: np.abs(rng.standard_normal(size)) * 1e30,
    "the largest floats": lambda rng, size: rng.choice([-3.4e38, 3.4e38], size),
}


def groups_of(kinds: list[str], size: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    return np.stack([GROUPS[kind](rng, size) for kind in kinds]).astype(np.float32)


def half_below(x: Floats) -> Floats:
    """The largest half that is not above x, from -LARGEST to LARGEST."""
    within = np.clip(x, -LARGEST, LARGEST)
    half = within.astype(np.float16)
    with np.errstate(over="ignore"):
        lower = np.nextafter(half, np.float16(-np.inf))
    return np.where(half.astype(np.float32) > within, lower, half).astype(np.float32)


def formula(groups: Floats, bits: int) -> tuple[Floats, Floats, Exact]:
    """Scale and bias of each group, and its numbers before they are rounded to integers."""
    levels = (1 << bits) - 1
    bias = half_below(groups.min(axis=1))
    scale = -half_below(-(groups.max(axis=1) - bias) / np.float32(levels))
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = (groups.astype(np.float64) - bias[:, None]) / scale[:, None].astype(np.float64)
    return scale, bias, np.clip(np.where(scale[:, None] > 0, numbers, 0.0), 0, levels)


def codes(packed: Packed, bits: int, size: int) -> npt.NDArray[np.int64]:
    """The numbers of each group: the first in the lowest bits of a word."""
    words = np.array(packed[0]).reshape(-1, 1) >> np.arange(0, 32, bits, dtype=np.uint32)
    return (words & ((1 << bits) - 1)).astype(np.int64).reshape(-1, size)


def in_mlx(packed: Packed, bits: int, size: int) -> mx.array:
    """Unpacked by MLX, in float32."""
    numbers, scales, biases = packed
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(numbers, scales, biases, group_size=size, bits=bits)


def packed_and_unpacked(array: Floats, bits: int, size: int) -> tuple[Packed, Floats]:
    packed = pack(mx.array(array), bits, size)
    return packed, np.array(unpack(packed, bits, size))


@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    bits=st.sampled_from([8, 4]),
    kinds=st.lists(st.sampled_from(sorted(GROUPS)), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 20),
)
def test_it_equals_the_formula(layout: tuple[int, int], bits: int, kinds: list[str], seed: int) -> None:
    dims, size = layout
    groups = groups_of(kinds * (dims // size), size, seed)
    array = groups.reshape(len(kinds), 1, 1, dims)
    packed, back = packed_and_unpacked(array, bits, size)
    assert [part.shape[3] for part in packed] == [dims * bits // 32, dims // size, dims // size]
    assert [part.dtype for part in packed] == [mx.uint32, mx.float16, mx.float16]
    scale, bias, numbers = formula(groups, bits)
    for part, expected in zip(packed[1:], (scale, bias), strict=True):
        assert np.array_equal(np.array(part).astype(np.float32).reshape(-1), expected)
    found = codes(packed, bits, size)
    assert np.all(np.abs(found - numbers) <= 0.5 + 1e-4), "not the nearest number"
    # A product of 8 and 11 bits is exact in float32, so only the sum is rounded, whether fused or not.
    expected = found.astype(np.float32) * scale[:, None] + bias[:, None]
    assert np.array_equal(back.reshape(groups.shape), expected)


@settings(max_examples=200, deadline=None)
@given(
    size=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([8, 4]),
    kinds=st.lists(st.sampled_from(sorted(GROUPS)), min_size=1, max_size=6),
    seed=st.integers(0, 1 << 20),
)
def test_no_number_is_off_by_more_than_half_a_step(size: int, bits: int, kinds: list[str], seed: int) -> None:
    """A step is a share of the group's range, widened by what half precision does to the bias and then to the scale.

    Numbers up to 65504 always lie within what can be expressed; others become the nearest that can.
    """
    groups = groups_of(kinds, size, seed)
    _, back = packed_and_unpacked(groups, bits, size)
    levels, x = (1 << bits) - 1, groups.astype(np.float64)
    low, high = (np.clip(end(axis=1, keepdims=True), -LARGEST, None) for end in (x.min, x.max))
    low = np.minimum(low, LARGEST)
    step = (high - low + np.abs(low) * ULP + SMALLEST) / levels * (1 + ULP) + SMALLEST
    step = np.minimum(step, LARGEST)
    reachable = np.clip(x, -LARGEST, low + levels * LARGEST)
    rounding = 2.0**-21 * (np.abs(low) + levels * step)
    within = np.abs(x).max(axis=1) <= LARGEST
    assert np.array_equal(reachable[within], x[within])
    assert np.isfinite(back).all()
    # Beyond that the top of what can be expressed depends on the bias, which is up to an ULP below the least.
    slack = np.where(within, 0.0, LARGEST * ULP)[:, None]
    assert np.all(np.abs(back - reachable) <= step / 2 + rounding + slack)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_ends_of_a_group_are_expressed(bits: int, size: int) -> None:
    """Bias and scale are rounded outwards: nothing is cut off, so the largest of a group is no worse than the rest."""
    groups = groups_of(["normal", "far from zero", "far below zero", "negative", "an outlier"] * 40, size, 3)
    packed, _ = packed_and_unpacked(groups, bits, size)
    scale, bias = (np.array(part, np.float64).reshape(-1) for part in packed[1:])
    assert np.all(bias <= groups.min(axis=1))
    assert np.all(bias + scale * ((1 << bits) - 1) >= groups.max(axis=1) * (1 - 2.0**-23 * np.sign(groups.max(axis=1))))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dims", "size"), LAYOUTS)
def test_mlx_unpacks_the_same_numbers(dims: int, size: int, bits: int) -> None:
    kinds = [kind for kind in sorted(GROUPS) if "subnormal" not in kind]
    groups = groups_of(kinds * (6 * dims // size), size, dims + size)
    packed, back = packed_and_unpacked(groups.reshape(-1, 3, 2, dims), bits, size)
    theirs = in_mlx(packed, bits, size)
    assert back.shape == theirs.shape
    assert np.array_equal(back, np.array(theirs))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_what_mlx_packed_is_unpacked(size: int, bits: int) -> None:
    """Its scales may be negative, with the bias at the top."""
    groups = groups_of(["normal", "negative", "an outlier"] * 8, size, 5).reshape(6, 2, 2, size)
    numbers, scales, biases = mx.quantize(mx.array(groups), size, bits)
    assert (scales < 0).any()
    packed = numbers, scales.astype(mx.float16), biases.astype(mx.float16)
    assert mx.array_equal(unpack(packed, bits, size), in_mlx(packed, bits, size))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 4]),
    size=st.sampled_from([32, 64, 128]),
    bad=st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]),
    group=st.integers(0, 11),
    place=st.integers(0, 127),
    many=st.booleans(),
)
def test_what_is_not_finite_poisons_its_group_alone(
    bits: int, size: int, bad: float, group: int, place: int, many: bool
) -> None:
    groups = groups_of(["normal"] * 12, size, 1)
    _, sound = packed_and_unpacked(groups, bits, size)
    groups[group, place % size] = bad
    if many:
        groups[group, : place % size] = bad
    _, back = packed_and_unpacked(groups, bits, size)
    others = np.arange(12) != group
    assert np.isnan(back[group]).all()
    assert np.array_equal(back[others], sound[others])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dims", "size"), [(64, 32), (96, 32), (128, 128)])
def test_a_vector_has_the_same_bits_among_others(dims: int, size: int, bits: int) -> None:
    """Many pieces of the thread pool, the last one short, against a vector at a time, which is never shared out."""
    shape = (3, 1009, dims)
    array = np.random.default_rng(9).standard_normal(shape).astype(np.float32) * 5
    assert array.size > 2 * 64 * 1024
    packed, back = packed_and_unpacked(array, bits, size)
    views = [np.array(part) for part in packed]
    for row, column in [(r, c) for r in range(3) for c in (*range(0, 1009, 7), 1008)]:
        alone, alone_back = packed_and_unpacked(array[row, column], bits, size)
        for view, part in zip(views, alone, strict=True):
            assert np.array_equal(view[row, column], np.array(part))
        assert np.array_equal(back[row, column], alone_back)


def test_the_numbers_last_written_win() -> None:
    """Memory that is filled behind MLX's back must not be shared between results."""
    first, second = (groups_of(["normal"], 64, seed) for seed in (1, 2))
    packed = [pack(mx.array(array), 8, 64) for array in (first, second)]
    back = [np.array(unpack(parts, 8, 64)) for parts in packed]
    assert np.allclose(back[0], first, atol=0.02)
    assert np.allclose(back[1], second, atol=0.02)


def test_views_with_gaps_are_read_in_their_own_order() -> None:
    array = mx.random.normal((2, 9, 4, 64))
    turned = array.transpose(0, 2, 1, 3)[:, 1:, 2:]
    whole = mx.array(np.ascontiguousarray(np.array(turned)))
    for ours, expected in zip(pack(turned, 4, 32), pack(whole, 4, 32), strict=True):
        assert mx.array_equal(ours, expected)
    numbers, scales, biases = pack(array, 4, 32)
    part = unpack((numbers[:, 3:5], scales[:, 3:5], biases[:, 3:5]), 4, 32)
    assert mx.array_equal(part, unpack((numbers, scales, biases), 4, 32)[:, 3:5])


def test_nothing_is_packed_to_nothing() -> None:
    packed = pack(mx.zeros((1, 2, 0, 64)), 8, 32)
    assert [part.shape for part in packed] == [(1, 2, 0, 16), (1, 2, 0, 2), (1, 2, 0, 2)]
    assert unpack(packed, 8, 32).shape == (1, 2, 0, 64)


def tiles_of(kinds: list[str], tiles: int, dims: int, seed: int) -> Floats:
    return groups_of(kinds * tiles * TILE, dims, seed)[: tiles * TILE].reshape(1, 1, tiles * TILE, dims)


def as_turned(keys: Floats, *, back: bool = False) -> Exact:
    """[..., d] in float64: a Hadamard matrix over stretches of a power of two."""
    stretch = keys.shape[-1] & -keys.shape[-1]
    signs = np.array([[1]])
    while len(signs) < stretch:
        signs = np.block([[signs, signs], [signs, -signs]])
    share = stretch.bit_length() - 1
    factor = 2.0 ** -(share // 2 if back else share - share // 2)
    apart = keys.astype(np.float64).reshape(*keys.shape[:-1], -1, stretch)
    found: Exact = (apart @ signs * factor).reshape(keys.shape)
    return found


@pytest.mark.parametrize(("dims", "size"), [(64, 32), (64, 64), (96, 32), (128, 128), (256, 64)])
@pytest.mark.parametrize("kind", ["normal", "far from zero", "an outlier", "zero"])
def test_tiles_are_turned_without_their_mean(kind: str, dims: int, size: int) -> None:
    """Against the formula in float64: what comes back is at most half a step off, of groups of what is turned."""
    keys = tiles_of([kind, "normal"], 3, dims, 5)
    numbers, scales, biases, means = pack_tiles(mx.array(keys), 4, size)
    turned = as_turned(keys).reshape(3, TILE, dims)
    kept = np.array(means).astype(np.float64).reshape(3, -1)[:, :dims]
    assert np.allclose(kept, turned.mean(axis=1), rtol=2 * ULP, atol=1e-3)
    apart = (turned - kept[:, None]).reshape(-1, size)
    steps = (apart.max(axis=1) - apart.min(axis=1)) / 15
    found = np.array(unpack((numbers, scales, biases), 4, size)).astype(np.float64).reshape(-1, size)
    assert (
        np.abs(found - apart) <= (0.5 * steps * (1 + 4 * ULP) + np.abs(apart).max(axis=1) * 2 * ULP + 1e-6)[:, None]
    ).all()
    whole = np.array(unpack_tiles((numbers, scales, biases, means), 4, size))
    again = as_turned(found.reshape(3, TILE, dims) + kept[:, None], back=True).reshape(keys.shape)
    assert np.abs(whole - again).max() <= 1e-5 * (1 + np.abs(keys).max())


def test_each_tile_is_packed_as_if_it_were_alone() -> None:
    keys = mx.array(tiles_of(["normal", "an outlier"], 5, 64, 1))
    together = pack_tiles(keys, 4, 32)
    for first in range(0, 5 * TILE, TILE):
        for whole, part in zip(together, pack_tiles(keys[:, :, first : first + TILE], 4, 32), strict=True):
            assert mx.array_equal(whole[:, :, first : first + TILE], part)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_position_that_is_not_finite_spoils_no_other(wrong: float) -> None:
    keys = tiles_of(["normal"], 2, 64, 2)
    keys[0, 0, 70, 3] = wrong
    found = np.array(unpack_tiles(pack_tiles(mx.array(keys), 4, 64), 4, 64))[0, 0]
    assert np.isnan(found[70]).any()
    others = np.delete(np.arange(2 * TILE), 70)
    assert np.abs(found[others] - keys[0, 0, others]).max() < 0.6


@pytest.mark.parametrize(("dims", "size"), [(64, 32), (96, 32), (256, 64)])
def test_tiles_in_c_are_those_of_mlx(dims: int, size: int) -> None:
    """Not to the bit: MLX makes zero exact."""
    keys, values = (mx.array(tiles_of(["normal"], 2, dims, seed)) for seed in (3, 4))
    packing = KvPacking(bits=4, group_size=size, start=64, rotated=True)
    ours, theirs = (form.unpack(form.pack(keys, values)) for form in (KvFormat(packing, True), KvFormat(packing)))
    for one, other, exact in zip(ours, theirs, (keys, values), strict=True):
        errors = [mx.sqrt(((side - exact) ** 2).mean()).item() for side in (one, other)]
        assert 0.8 < errors[0] / errors[1] < 1.25
    turned_once = turned(keys)
    assert mx.allclose(turned(turned_once, back=True), keys, atol=1e-2)
    queries = mx.random.normal(keys.shape)
    products = (queries * keys).sum(-1), (turned(queries, back=True) * turned_once).sum(-1)
    assert mx.allclose(*products, atol=1e-2)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_format_packs_keys_and_values_of_different_sizes(bits: int, native: bool) -> None:
    form = KvFormat(KvPacking(bits=bits, group_size=32), native=native)
    keys, values = mx.random.normal((1, 2, 5, 96)), mx.random.normal((1, 2, 5, 64)) - 4
    arrays = form.pack(keys, values)
    for before, after in zip((keys, values), form.unpack(arrays), strict=True):
        assert after.dtype == before.dtype
        assert mx.abs(after - before).max() < (0.03 if bits == 8 else 0.4)
    assert sum(int(array.nbytes) for array in arrays) == 5 * form.token_bytes(2, 96, 64, keys.dtype)
