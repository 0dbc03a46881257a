"""Attention of models over slots of which a part is packed by MLX: what machines with a GPU run, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from millpond.kv.arena import Arena
from millpond.kv.format import KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.rotated import RotatedSpec
from millpond.kv.slots import KvSpec, RingSpec
from millpond.model.attention import over
from millpond.model.cpu_math import attention
from millpond.types import KvPacking

HEADS, GROUPS, DIM, SCALE = 6, 2, 64, 0.2
Floats = npt.NDArray[np.float32]


def rounded(form: KvFormat, start: int, *sides: Floats) -> list[Floats]:
    """[G, m, dim] each: packed and unpacked from ``start`` on."""
    packed = form.unpack(form.pack(*(mx.array(side[None, :, start:]) for side in sides)))
    return [np.concatenate([s[:, :start], np.array(p)[0]], axis=1) for s, p in zip(sides, packed, strict=True)]


def attended(arena: Arena, queries: Floats, pasts: Sequence[Sequence[Floats]]) -> Floats:
    """What queries [n, H, L, DIM] get of a slot that is given the last L keys and values of each row."""
    columns = queries.shape[2]
    (slot,) = arena.begin(columns)
    mask = slot.make_mask(columns)
    new = (mx.array(np.stack([past[side][:, -columns:] for past in pasts])) for side in (0, 1))
    keys, values = slot.update_and_fetch(*new)
    return np.array(over(attention)(mx.array(queries), keys, values, slot, SCALE, mask))


def expected(queries: Floats, held: Sequence[Floats], window: int) -> npt.NDArray[np.float64]:
    """The same of one row, whose queries [H, L, DIM] are those of its last positions, in double precision."""
    keys, values = (np.repeat(side.astype(np.float64), HEADS // GROUPS, axis=0) for side in held)
    column = np.arange(keys.shape[1])
    own = column[-queries.shape[1] :, None]
    scores = np.where((column <= own) & (column > own - window), SCALE * queries @ keys.transpose(0, 2, 1), -np.inf)
    weights = np.exp(scores)
    found: npt.NDArray[np.float64] = (weights / weights.sum(axis=-1, keepdims=True)) @ values
    return found


@pytest.mark.parametrize("lengths", [[100, 100], [100, 3, 63, 64, 300]])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize(("start", "window"), [(0, None), (64, None), (320, None), (0, 40), (64, 40)])
def test_it_sees_what_the_slots_hold(start: int, window: int | None, columns: int, lengths: list[int]) -> None:
    form, rng = KvFormat(KvPacking(bits=8, group_size=32, start=start)), np.random.default_rng(0)
    value_dim = 32 if start and not window else DIM  # mlx-lm's attention, taken when all is packed, knows one size
    sizes = (GROUPS, DIM, value_dim, mx.float32, form)
    spec = RingSpec(*sizes, window=window) if window else KvSpec(*sizes)
    arena, pasts = Arena([spec]), []
    for length in lengths:
        whole = [rng.standard_normal((GROUPS, length + columns, dim)).astype(np.float32) for dim in (DIM, value_dim)]
        exact = min(spec.exact, length)
        first = max(0, length - window) if window else exact
        before, behind = ([mx.array(side[None, :, a:b]) for side in whole] for a, b in ((0, exact), (first, length)))
        arrays = form.pack(*behind) if first < length else ()
        arena.put(str(len(pasts)), [LeafRow(arrays, exact=tuple(before) if exact else ())], length)
        pasts.append(whole)
    queries = rng.standard_normal((len(lengths), HEADS, columns, DIM)).astype(np.float32)
    result = attended(arena, queries, pasts)
    for row, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        held = rounded(form, spec.exact, *past) if length + columns > spec.exact else past
        assert np.abs(result[row] - expected(queries[row], held, window or length + columns)).max() < 1e-5


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("lengths", [[100, 100], [128, 3, 63, 64, 300]])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("start", [64, 320])
def test_it_sees_tiles_and_what_is_around_them(start: int, columns: int, lengths: list[int], unpacked: bool) -> None:
    form = KvFormat(KvPacking(bits=4, group_size=32, start=start, rotated=True), unpacked=unpacked)
    rng = np.random.default_rng(0)
    spec = RotatedSpec(GROUPS, DIM, 32, mx.float32, form)
    arena, pasts = Arena([spec]), []
    for length in lengths:
        whole = [rng.standard_normal((GROUPS, length + columns, dim)).astype(np.float32) for dim in (DIM, 32)]
        borders = (0, min(start, length), max(min(start, length), min(form.end(length), length)), length)
        before, behind, newest = (
            tuple(mx.array(side[None, :, first:end]) for side in whole) if first < end else ()
            for first, end in pairwise(borders)
        )
        arena.put(str(len(pasts)), [LeafRow(form.pack(*behind) if behind else (), exact=before, newest=newest)], length)
        pasts.append(whole)
    queries = rng.standard_normal((len(lengths), HEADS, columns, DIM)).astype(np.float32)
    result = attended(arena, queries, pasts)
    for row, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        end = form.end(length)
        held = [side[:, :end] for side in past]
        held = rounded(form, start, *held) if length > start and end > start else held
        held = [np.concatenate([side, whole[:, end:]], axis=1) for side, whole in zip(held, past, strict=True)]
        assert np.abs(result[row] - expected(queries[row], held, length + columns)).max() < 1e-5
