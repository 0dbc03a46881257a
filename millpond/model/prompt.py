"""A prompt while it is being read: mlx-lm's own caches, and what of them is packed already.

Within a prompt attention sees keys and values as they were computed, or restored: packing them before the prompt is
read would cost more quality than packing them afterwards (docs/decisions/0014-packed-keys-and-values.md). Each
position is packed once, right after the chunk that computed it; what was restored is never packed again. Engine thread
only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from millpond.kv.format import Arrays, KvFormat
from millpond.kv.leaf import LeafRow
from millpond.model.leaves import leaves_of
from millpond.model.upstream import PromptCache, cache_bytes, new_cache
from millpond.model.written import expect
from millpond.prefix.records import Kind


class Piece:
    """Positions [start, end) of one layer as rows keep them, [1, heads, end - start, x] each."""

    def __init__(self, start: int, end: int, arrays: Arrays) -> None:
        self.start = start
        self.end = end
        self.arrays = arrays

    def cut(self, start: int, end: int) -> Arrays:
        """What it holds of [start, end), as lazy views."""
        return tuple(
            array[:, :, max(start, self.start) - self.start : min(end, self.end) - self.start] for array in self.arrays
        )


class Prompt:
    """Caches of one prompt that are filled chunk by chunk and then adopted into a row."""

    def __init__(self, caches: PromptCache, form: KvFormat, length: int = 0) -> None:
        self.caches = caches
        self.leaves = leaves_of(caches)
        self.length = length
        self.form = form
        self.pieces: list[list[Piece]] = [[] for _ in self.leaves] if form.packs else []
        """Of each leaf, in order."""

    @property
    def nbytes(self) -> int:
        packed = (array for pieces in self.pieces for piece in pieces for array in piece.arrays)
        return cache_bytes(self.caches) + sum(int(array.nbytes) for array in packed)

    def packed_after(self, start: int, count: int) -> None:
        """Pack the ``count`` positions from ``start`` on, which a forward has just added."""
        self.length = start + count
        packed: list[Arrays] = []
        for leaf, pieces in zip(self.leaves, self.pieces, strict=bool(self.pieces)):
            if not leaf.packable:
                continue
            form = leaf.kept_as(self.form)
            first, end = max(form.end(start), leaf.exact(form)), form.end(self.length)
            if first < end:
                packed.append(form.pack(*leaf.span(first, end)))
                pieces.append(Piece(first, end, packed[-1]))
            # The cache itself holds what any token of the last chunk could see, and blocks are cut from that.
            pieces[:] = [piece for piece in pieces if piece.end > leaf.oldest(start)]
        mx.eval(packed)

    def spans(self, start: int, end: int, kind: Kind) -> list[Arrays]:
        """Positions [start, end), as they are kept, lazily, one entry per leaf; an empty one for leaves of other
        kinds."""
        return [self._span(n, start, end) if leaf.kind is kind else () for n, leaf in enumerate(self.leaves)]

    def _span(self, number: int, start: int, end: int) -> Arrays:
        leaf = self.leaves[number]
        if not self.pieces or not leaf.packable or end <= leaf.exact(self.form):
            return leaf.span(start, end)
        if start >= leaf.kept_as(self.form).end(end):
            return self._newest(number, start, end)
        pieces = [piece for piece in self.pieces[number] if piece.end > start and piece.start < end]
        if not pieces or pieces[0].start > start:
            raise ValueError(f"position {start} has left the window")
        return joined([piece.cut(start, end) for piece in pieces])

    def rows(self) -> Iterator[LeafRow]:
        """Yield each leaf for adoption, dropping it once it is copied."""
        for number, leaf in enumerate(self.leaves):
            yield self._packed_row(number) if self.pieces and leaf.packable else leaf.row()
            leaf.clear()
            if self.pieces:
                self.pieces[number] = []

    def _packed_row(self, number: int) -> LeafRow:
        leaf = self.leaves[number]
        exact, end = min(leaf.exact(self.form), self.length), leaf.kept_as(self.form).end(self.length)
        first = max(leaf.oldest(self.length), exact)
        pieces = [piece.cut(first, end) for piece in self.pieces[number] if piece.end > first and piece.start < end]
        newest = self._newest(number, end, self.length) if end < self.length else ()
        return LeafRow(joined(pieces) if pieces else (), exact=leaf.span(0, exact) if exact else (), newest=newest)

    def _newest(self, number: int, start: int, end: int) -> Arrays:
        """Positions behind the last whole tile, as computed."""
        last = self.pieces[number][-1] if self.pieces[number] else None
        if last is not None and last.start <= start and last.end >= end:
            return last.cut(start, end)
        return self.leaves[number].span(start, end)


def joined(pieces: Sequence[Arrays]) -> Arrays:
    """Pieces one after the other."""
    return tuple(
        mx.concatenate(list(arrays), axis=2) if len(arrays) > 1 else arrays[0] for arrays in zip(*pieces, strict=True)
    )


def new_prompt(network: nn.Module, form: KvFormat, expected: int = 0) -> Prompt:
    """A prompt of which nothing has been read, of ``expected`` tokens in all where that is known."""
    caches = new_cache(network)
    if form.native:
        expect(caches, expected)
    return Prompt(caches, form)
