"""Slots in C beside what a dict of lists would hold: everything written to them, as they keep it, and attention over it
in float64.

A row's past is a list of positions [heads, 1, dim] each, so rows can be moved and rolled back by list operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from millpond.kv.arena import Arena
from millpond.kv.format import KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.rotated import RotatedSpec
from millpond.kv.slots import KvSpec, RingSpec
from millpond.model.cpu_math import LOG2_E
from millpond.types import KvPacking

Floats = npt.NDArray[np.float32]
SCALE = 0.25
NAMES = map(str, count())
"""Requests' names: no two are alike."""


@dataclass(frozen=True)
class Layer:
    """One layer under test."""

    packing: KvPacking = field(default_factory=KvPacking)
    window: int | None = None
    groups: int = 2
    sharing: int = 3
    """Query heads per key head."""
    key_dim: int = 64
    value_dim: int = 32

    @property
    def spec(self) -> KvSpec:
        form = KvFormat(self.packing, native=True)
        sizes = (self.groups, self.key_dim, self.value_dim, mx.float32, form)
        if self.window:
            return RingSpec(*sizes, window=self.window)
        return RotatedSpec(*sizes) if form.rotated else KvSpec(*sizes)

    @property
    def heads(self) -> int:
        return self.groups * self.sharing


@dataclass
class Past:
    """Keys and values [groups, m, dim] of one row, as they were computed."""

    keys: Floats
    values: Floats

    @property
    def length(self) -> int:
        return int(self.keys.shape[1])

    def cut(self, start: int, end: int) -> Past:
        return Past(self.keys[:, start:end], self.values[:, start:end])

    def followed_by(self, other: Past) -> Past:
        keys, values = ((self.keys, other.keys), (self.values, other.values))
        return Past(np.concatenate(keys, axis=1), np.concatenate(values, axis=1))


def drawn(layer: Layer, rng: np.random.Generator, length: int) -> Past:
    keys, values = (
        rng.standard_normal((layer.groups, length, dim)).astype(np.float32) for dim in (layer.key_dim, layer.value_dim)
    )
    return Past(keys, values + 1)


def kept(layer: Layer, past: Past, new: int) -> Past:
    """What slots hold of it in a forward that writes the last ``new``: packed and unpacked, but for the exact positions
    and those that are in no whole tile."""
    spec, form = layer.spec, layer.spec.format
    end = form.end(past.length - new) if form.rotated else past.length
    if not form.packs or end <= spec.exact:
        return past
    behind = past.cut(spec.exact, end)
    keys, values = form.unpack(form.pack(mx.array(behind.keys[None]), mx.array(behind.values[None])))
    packed = Past(np.array(keys)[0], np.array(values)[0])
    return past.cut(0, spec.exact).followed_by(packed).followed_by(past.cut(end, past.length))


def leaf_row(layer: Layer, past: Past) -> LeafRow:
    """A finished prompt as an arena adopts it."""
    spec, form = layer.spec, layer.spec.format
    exact = min(spec.exact, past.length)
    first = max(0, past.length - layer.window) if layer.window else exact
    end = max(first, min(form.end(past.length), past.length))
    before, behind, newest = (
        (mx.array(side.keys[None]), mx.array(side.values[None])) if side.length else ()
        for side in (past.cut(0, exact), past.cut(first, end), past.cut(end, past.length))
    )
    return LeafRow(form.pack(*behind) if form.packs and behind else behind, exact=before, newest=newest)


def adopt(arena: Arena, layer: Layer, past: Past) -> None:
    arena.put(next(NAMES), [leaf_row(layer, past)] if past.length else (), past.length)


def expected(layer: Layer, past: Past, queries: Floats) -> npt.NDArray[np.float64]:
    """Attention of the newest tokens' queries [heads, L, dim] over a row that ends with them, in float64."""
    count = queries.shape[1]
    held = kept(layer, past, count)
    keys, values = (np.repeat(side.astype(np.float64), layer.sharing, axis=0) for side in (held.keys, held.values))
    scores = SCALE * queries.astype(np.float64) @ keys.transpose(0, 2, 1)
    own = np.arange(past.length - count, past.length)[:, None]
    column = np.arange(past.length)[None]
    seen = column <= own
    if layer.window:
        seen &= column > own - layer.window
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float64] = (weights / weights.sum(axis=-1, keepdims=True)) @ values
    return result


def queries_of(layer: Layer, rng: np.random.Generator, rows: int, length: int) -> Floats:
    return rng.standard_normal((rows, layer.heads, length, layer.key_dim)).astype(np.float32) * np.float32(0.5)


def filled(layer: Layer, *lengths: int) -> tuple[Arena, list[Past], Floats]:
    """An arena, one new token for every row, and its queries."""
    rng, arena = np.random.default_rng(4), Arena([layer.spec])
    for length in lengths:
        adopt(arena, layer, drawn(layer, rng, length))
    return arena, [drawn(layer, rng, 1) for _ in lengths], queries_of(layer, rng, len(lengths), 1)


def forward(arena: Arena, new: list[Past], queries: Floats) -> mx.array:
    """Write new tokens into every row and attend, lazily, as a model's layer does. Ends with ``arena.advance``."""
    (slot,) = arena.begin(queries.shape[2])
    keys, values = (mx.array(np.stack(side)) for side in ([p.keys for p in new], [p.values for p in new]))
    assert slot.make_mask(queries.shape[2]) is None
    slot.update_and_fetch(keys, values)
    return slot.attend(mx.array(queries), SCALE * LOG2_E)


def alone(layer: Layer, past: Past, new: Past, queries: Floats) -> Floats:
    """The result of a forward of this row with no others, in an arena of its own."""
    arena = Arena([layer.spec])
    adopt(arena, layer, past)
    result: Floats = np.array(forward(arena, [new], queries[None]))[0]
    return result
