"""Between caches and the records of the prefix cache: cut blocks out of a prompt or a row, and put them together.

A record holds the layers of one kind. Layers of equal shape are stacked into one array, [layers, heads, tokens, dim],
so that a block is a few buffers of its own, never a view that keeps a larger one alive. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kvarn.kv.arena import LayerRow
from kvarn.model.upstream import (
    LayerCache,
    PromptCache,
    cache_kind,
    leaves,
    new_cache,
    put_span,
    put_state,
    snapshot,
    spans,
    spans_of,
    window_of,
)
from kvarn.prefix.match import Claim
from kvarn.prefix.planner import Layout
from kvarn.prefix.records import BLOCK, Kind, Payload, Tensor

AGREEMENT = 0.05
"""Largest difference of a recomputed block, as a share of its largest value: rounding is far below, errors above."""


class Stored:
    """A record in memory. Immutable; the arrays are its own."""

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self.arrays = tuple(arrays)

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(Tensor(_name(a.dtype), tuple(a.shape), int(a.nbytes)) for a in self.arrays)

    def dump(self) -> bytes:
        return b"".join(np.asarray(array.reshape(-1).view(mx.uint8)).tobytes() for array in self.arrays)


def stored(tensors: Sequence[Tensor], payload: memoryview) -> Stored:
    """Arrays from the bytes of a file, copied. Raises ValueError for an element type that mlx does not have."""
    arrays, offset = [], 0
    for tensor in tensors:
        dtype = getattr(mx, tensor.dtype, None)
        if not isinstance(dtype, mx.Dtype):
            raise ValueError(f"{tensor.dtype!r} is not an element type")
        raw = mx.array(np.frombuffer(payload[offset : offset + tensor.nbytes], dtype=np.uint8))
        arrays.append(raw.view(dtype).reshape(tensor.shape))
        offset += tensor.nbytes
    mx.eval(arrays)
    return Stored(arrays)


def agree(held: Payload, computed: Payload) -> bool:
    """Whether two records of the same block hold the same numbers, but for rounding."""
    pairs = zip(_stored(held).arrays, _stored(computed).arrays, strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype and _close(a, b) for a, b in pairs)


def _close(a: mx.array, b: mx.array) -> bool:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.abs(a - b).max() <= AGREEMENT * mx.abs(b).max()).item())


def finite(records: Mapping[Kind, Stored]) -> mx.array:
    """Whether every number is finite, as a lazy bool scalar: what is not must not be handed to the next request."""
    sums = [array.astype(mx.float32).sum() for record in records.values() for array in record.arrays if array.size]
    return mx.isfinite(mx.stack(sums)).all() if sums else mx.array(True)


@dataclass(frozen=True)
class BlockFormat:
    """How the layers of one model map to records. ``kv`` and ``window`` are groups of leaf numbers of equal shape."""

    layout: Layout
    kv: tuple[tuple[int, ...], ...]
    window: tuple[tuple[int, ...], ...]
    state: tuple[int, ...]
    layers: tuple[str, ...]
    """One line per leaf, for the namespace."""
    dtype: str
    token_bytes: int
    """Bytes of one token in kv records."""
    state_bytes: int
    """Bytes of one snapshot."""

    # --- cutting ----------------------------------------------------------------------------------------------

    def spans(self, rows: Sequence[LayerRow | None], kind: Kind) -> Stored:
        """Stack what a lane or upstream.spans_of returned, one entry per leaf, into a record; lazy."""
        groups = self.kv if kind is Kind.KV else self.window
        arrays = []
        for group in groups:
            members = [cast(LayerRow, rows[leaf]) for leaf in group]
            arrays += [_stacked([row.keys for row in members]), _stacked([row.values for row in members])]
        return Stored(arrays)

    def window_start(self, start: int, end: int) -> int:
        """First position that the window record of the block [start, end) holds."""
        return max(start, end - self.layout.window)

    def snapshot(self, cache: PromptCache) -> Stored:
        """The recurrent layers' arrays, copied: a view may keep a whole chunk's activations alive."""
        flat = leaves(cache)
        first = mx.array([0], dtype=mx.int32)
        return Stored([mx.take(array, first, axis=0) for leaf in self.state for array in snapshot(flat[leaf])])

    # --- putting together -------------------------------------------------------------------------------------

    def restored(self, network: nn.Module, claim: Claim, capacity: int) -> PromptCache:
        """A prompt's cache that holds the claimed tokens, with room for ``capacity`` of them in all; lazy."""
        cache = new_cache(network)
        flat = leaves(cache)
        for group in range(len(self.kv)):
            self._put_kv(flat, group, claim, capacity)
        for group in range(len(self.window)):
            self._put_window(flat, group, claim)
        if self.state:
            arrays = list(_stored(claim.parts[-1].node.records[Kind.STATE]).arrays)
            for leaf in self.state:
                count = len(arrays) // (len(self.state) - self.state.index(leaf))
                put_state(flat[leaf], arrays[:count])
                arrays = arrays[count:]
        return cache

    def _put_kv(self, flat: list[LayerCache], group: int, claim: Claim, capacity: int) -> None:
        blocks = [(_stored(part.node.records[Kind.KV]).arrays, part.used) for part in claim.parts]
        room = max(0, capacity - claim.position)
        for place, leaf in enumerate(self.kv[group]):
            sides = [
                _joined([arrays[2 * group + side][place : place + 1, :, :used] for arrays, used in blocks], back=room)
                for side in (0, 1)
            ]
            put_span(flat[leaf], sides[0], sides[1], claim.position)

    def _put_window(self, flat: list[LayerCache], group: int, claim: Claim) -> None:
        size = window_of(flat[self.window[group][0]])
        pieces: list[tuple[tuple[mx.array, ...], int, int]] = []
        begins = claim.position
        for part in reversed(claim.parts):
            record = part.node.records.get(Kind.WINDOW)
            if record is None or begins <= max(0, claim.position - size):
                break
            held_from = self.window_start(part.node.start, part.node.end)
            take_from = max(held_from, claim.position - size)
            pieces.insert(0, (_stored(record).arrays, take_from - held_from, part.end - held_from))
            begins = take_from
            if held_from > part.node.start:
                break
        # The oldest of a full window is dropped before anybody looks at it; it may be missing here.
        front = min(size, claim.position) - (claim.position - begins)
        for place, leaf in enumerate(self.window[group]):
            sides = [
                _joined([arrays[2 * group + side][place : place + 1, :, a:b] for arrays, a, b in pieces], front=front)
                for side in (0, 1)
            ]
            put_span(flat[leaf], sides[0], sides[1], claim.position)


def block_format(cache: PromptCache) -> BlockFormat | str:
    """The format for caches like this one, which a forward has filled; or why such caches cannot be cut into blocks."""
    flat = leaves(cache)
    kinds = [cache_kind(leaf) for leaf in flat]
    strange = sorted(set(kinds) - {"kv", "window", "state"})
    if strange:
        return f"its layers keep {', '.join(strange)}, which cannot be cut into blocks"
    groups: dict[tuple[str, str], list[int]] = {}
    layers, dtypes, token_bytes, state_bytes = [], [], 0, 0
    for index, (leaf, kind) in enumerate(zip(flat, kinds, strict=True)):
        try:
            arrays = snapshot(leaf) if kind == "state" else list(spans(leaf, 0, 1).used)
        except (TypeError, ValueError) as error:
            return f"layer {index}: {error}"
        shape = " ".join(f"{_name(a.dtype)}{list(a.shape)}" for a in arrays)
        layers.append(f"{kind} {window_of(leaf)} {shape}")
        dtypes.append(_name(arrays[0].dtype))
        nbytes = sum(int(a.nbytes) for a in arrays)
        state_bytes += nbytes if kind == "state" else 0
        token_bytes += nbytes if kind == "kv" else 0
        groups.setdefault((kind, layers[-1]), []).append(index)
    windows = sorted({window_of(leaf) for leaf in flat} - {0})
    if len(windows) > 1 and windows[0] < BLOCK:
        return f"its sliding windows of {windows} tokens differ, and one is shorter than a block of {BLOCK}"
    return BlockFormat(
        layout=Layout(window=windows[-1] if windows else 0, state="state" in kinds),
        kv=tuple(tuple(group) for (kind, _), group in groups.items() if kind == "kv"),
        window=tuple(tuple(group) for (kind, _), group in groups.items() if kind == "window"),
        state=tuple(index for index, kind in enumerate(kinds) if kind == "state"),
        layers=tuple(layers),
        dtype=dtypes[0],
        token_bytes=token_bytes,
        state_bytes=state_bytes,
    )


def cut_prompt(form: BlockFormat, cache: PromptCache, start: int, end: int, kind: Kind) -> Stored:
    """The record of the block [start, end) from a prompt's cache; lazy. A snapshot is of now, whatever the block."""
    if kind is Kind.STATE:
        return form.snapshot(cache)
    first = form.window_start(start, end) if kind is Kind.WINDOW else start
    return form.spans(spans_of(cache, first, end, kind is Kind.WINDOW), kind)


def block_grid(start: int, end: int) -> Iterable[tuple[int, int]]:
    """The whole blocks that [start, end) completes: those that end in (start, end]."""
    return ((stop - BLOCK, stop) for stop in range((start // BLOCK + 1) * BLOCK, end + 1, BLOCK))


def _stacked(arrays: list[mx.array]) -> mx.array:
    """[1, ...] views as one array [n, ...] in a buffer of its own, lazily."""
    if len(arrays) == 1:  # concatenating a single array copies nothing
        return mx.take(arrays[0], mx.array([0], dtype=mx.int32), axis=0)
    return mx.concatenate(arrays, axis=0)


def _joined(pieces: list[mx.array], front: int = 0, back: int = 0) -> mx.array:
    """[1, heads, n, dim] pieces one after the other, with unused positions before or behind them. Always a copy."""
    heads, dim, dtype = pieces[0].shape[1], pieces[0].shape[3], pieces[0].dtype
    before = [mx.zeros((1, heads, front, dim), dtype=dtype)] if front else []
    behind = [mx.zeros((1, heads, back, dim), dtype=dtype)] if back else []
    pieces = [*before, *pieces, *behind]
    # The cache is written in place later: it must not share a single block's buffer.
    return mx.concatenate(pieces, axis=2) if len(pieces) > 1 else mx.take(pieces[0], mx.array([0]), axis=0)


def _stored(payload: Payload) -> Stored:
    assert isinstance(payload, Stored)
    return payload


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
