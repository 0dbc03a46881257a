"""A restored prompt that is put together block by block, as blocks come from the disk.

Keys and values of a block go straight to their place in arrays that become a row: nothing is copied twice, and what has
come is in place while the disk still reads the rest. Windows and states, which are small, follow at the end. Engine
thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from millpond.kv.arena import AT_ONCE_BYTES
from millpond.kv.format import Arrays
from millpond.model.blocks import NUMBERS, BlockFormat, record, spaced
from millpond.model.prompt import Piece, Prompt, new_prompt
from millpond.model.upstream import cache_arrays
from millpond.native.untouched import zeros
from millpond.prefix.match import Part, RestorePlan
from millpond.prefix.records import Kind


class Assembly:
    """The first ``position`` tokens of a prompt, with room for ``capacity`` of them in all."""

    def __init__(self, blocks: BlockFormat, position: int, capacity: int) -> None:
        self.position = position
        self._capacity = max(position, capacity)
        self._blocks = blocks
        self._floats: dict[int, list[mx.array]] = {}
        """Of each leaf of keys and values, what is kept as computed: [1, heads, columns, dim], keys and values."""
        self._packed: dict[int, list[mx.array]] = {}
        """The same of what is packed."""
        self._newest: dict[int, Arrays] = {}
        """The same of what is behind the last whole tile, where tiles are packed."""
        self._put: set[int] = set()
        """Where the blocks begin that are in place."""
        self._waiting_bytes = 0

    @property
    def nbytes(self) -> int:
        kept = (self._floats, self._packed, self._newest)
        held = (array for arrays in kept for leaf in arrays.values() for array in leaf)
        return sum(int(array.nbytes) for array in held)

    def put(self, part: Part) -> None:
        """Put a block's keys and values into place, lazily until there are many. Its record must be in memory."""
        if part.node.start in self._put:
            return
        self._put.add(part.node.start)
        arrays = record(part.node.records[Kind.KV]).arrays
        groups = self._blocks.groups[Kind.KV]
        each = len(arrays) // max(1, len(groups))
        for number, group in enumerate(groups):
            self._into(group, arrays[number * each : (number + 1) * each], part)
        self._waiting_bytes += sum(int(array.nbytes) for array in arrays)
        if self._waiting_bytes >= AT_ONCE_BYTES:
            self.settle()

    def settle(self) -> None:
        """Wait for what has been put."""
        mx.eval(self._floats, self._packed, self._newest)
        self._waiting_bytes = 0

    def _into(self, group: Sequence[int], arrays: Arrays, part: Part) -> None:
        packed = arrays[0].dtype == NUMBERS
        targets, first, columns = self._floats, 0, self._exact if self._blocks.form.packs else self._capacity
        if packed:
            targets, first, columns = self._packed, self._exact, self._end - self._exact
        elif part.node.start >= self._end:
            self._newest |= {
                leaf: tuple(array[place : place + 1, :, : part.used] for array in arrays)
                for place, leaf in enumerate(group)
            }
            return
        for place, leaf in enumerate(group):
            if leaf not in targets:
                targets[leaf] = [zeros((1, a.shape[1], columns, a.shape[3]), a.dtype) for a in arrays]
            for target, array in zip(targets[leaf], arrays, strict=True):
                target[:, :, part.node.start - first : part.end - first] = array[place : place + 1, :, : part.used]

    @property
    def _exact(self) -> int:
        """Positions from the start that are never packed, as far as there are so many."""
        return min(self._blocks.form.packing.start, self.position)

    @property
    def _end(self) -> int:
        """Where the positions begin that are behind the last whole tile."""
        return self._blocks.form.end(self.position)

    def finished(self, network: nn.Module, plan: RestorePlan, *, whole: bool) -> Prompt:
        """The prompt, once all parts of the plan are in place. ``whole``: no forward will read behind them, so what is
        packed need not be unpacked."""
        self.settle()
        form = self._blocks.form
        prompt = new_prompt(network, form)
        prompt.length = self.position
        for leaf in {**self._floats, **self._packed}:
            floats = [tuple(self._floats.pop(leaf))] if leaf in self._floats else []
            if leaf in self._packed:
                together = tuple(self._packed.pop(leaf))
                prompt.pieces[leaf] = [Piece(self._exact, self._end, together)]
                if not whole:
                    floats.append(form.unpack(together))
            if newest := self._newest.pop(leaf, ()):
                if whole and prompt.pieces[leaf]:
                    prompt.pieces[leaf].append(Piece(self._end, self.position, newest))
                else:
                    floats.append(newest)
            if floats:
                prompt.leaves[leaf].put(self._spaced(floats, whole=whole), prompt.length)
        self._blocks.put_windows(prompt, plan, whole=whole)
        self._blocks.put_states(prompt, plan)
        mx.eval(cache_arrays(prompt.caches), [piece.arrays for pieces in prompt.pieces for piece in pieces])
        return prompt

    def _spaced(self, floats: Sequence[Arrays], *, whole: bool) -> Arrays:
        """Keys and values one after the other, with room for what follows, if anything does; of a packed format, else
        it is there."""
        if not self._blocks.form.packs:
            return floats[0]
        room = 0 if whole else self._capacity - sum(int(arrays[0].shape[2]) for arrays in floats)
        return tuple(spaced(side, 0, room) for side in zip(*floats, strict=True))
