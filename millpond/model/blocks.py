"""Between caches and the records of the prefix cache: cut blocks out of a prompt or a row, and put them together.

A record holds the layers of one kind. Layers of equal shape are stacked into one array, [layers, heads, tokens, dim],
so that a block is a few buffers of its own, never a view that keeps a larger one alive. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from millpond.kv.format import Arrays, KvFormat
from millpond.model.leaves import CARRIED, leaves_of
from millpond.model.prompt import Piece, Prompt, joined, new_prompt
from millpond.model.upstream import PromptCache
from millpond.native.untouched import zeros
from millpond.prefix.match import RestorePlan
from millpond.prefix.planner import Layout
from millpond.prefix.records import BLOCK, Kind, Payload, Tensor
from millpond.prefix.tree import Node

AGREEMENT = 0.05
"""Largest difference of a recomputed block, as a share of its largest value: rounding is far below, errors above."""
NUMBERS = mx.uint32
"""Element type by which packed layers are told from others, and where one of two sides begins."""
STEPS_APART = 3
"""Packed numbers may be so many steps further apart: what is nearly half a step is rounded up once and down once."""


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

    def kept(self) -> Arrays:
        """The arrays, which stay: as ReadRecord has it."""
        return self.arrays

    def dump(self) -> bytes:
        return b"".join(np.asarray(array.reshape(-1).view(mx.uint8)).tobytes() for array in self.arrays)


class ReadRecord:
    """A record as it was read: bytes in memory, of which arrays are made when somebody needs them."""

    def __init__(self, tensors: Sequence[Tensor], payload: memoryview) -> None:
        """Raises ValueError for an element type that mlx does not have."""
        self.tensors = tuple(tensors)
        self.nbytes = memoryview(payload.obj).nbytes
        """Those of the whole buffer, of which the payload is nearly all."""
        self._dtypes = [_dtype(tensor.dtype) for tensor in tensors]
        self._held: memoryview | Stored = payload

    @property
    def arrays(self) -> Arrays:
        """Made of the bytes each time, unless they are kept."""
        if isinstance(self._held, Stored):
            return self._held.arrays
        arrays, offset = [], 0
        for tensor, dtype in zip(self.tensors, self._dtypes, strict=True):
            raw = mx.array(np.frombuffer(self._held[offset : offset + tensor.nbytes], dtype=np.uint8))
            arrays.append(raw.view(dtype).reshape(tensor.shape))
            offset += tensor.nbytes
        return tuple(arrays)

    def kept(self) -> Arrays:
        """The same, which stay, and the bytes go: for those who look at them lazily."""
        if not isinstance(self._held, Stored):
            self._held = Stored(self.arrays)
            mx.eval(self._held.arrays)
        return self._held.arrays

    def dump(self) -> bytes:
        return self._held.dump() if isinstance(self._held, Stored) else bytes(self._held)


def record(payload: Payload) -> Stored | ReadRecord:
    """What the prefix cache holds, as what it is."""
    assert isinstance(payload, Stored | ReadRecord)
    return payload


def finite(records: Mapping[Kind, Stored]) -> mx.array:
    """Whether every number is finite, as a lazy bool scalar: what is not must not be handed to the next request."""
    sums = [array.astype(mx.float32).sum() for record in records.values() for array in record.arrays if array.size]
    return mx.isfinite(mx.stack(sums)).all() if sums else mx.array(True)


def evaluated(made: Sequence[Mapping[Kind, Stored]]) -> list[bool]:
    """Wait for the records of some blocks, for all at once; of each block, whether every number is finite."""
    sound = [finite(records) for records in made]
    mx.eval(sound, [array for records in made for record in records.values() for array in record.arrays])
    return [bool(one.item()) for one in sound]


@dataclass(frozen=True)
class BlockFormat:
    """How the leaves of one model map to records."""

    form: KvFormat
    layout: Layout
    groups: Mapping[Kind, list[list[int]]]
    """Of each kind, the numbers of the leaves of equal shape; a state is never stacked with another."""
    layers: tuple[str, ...]
    """One line per leaf, for the namespace."""
    dtype: str
    token_bytes: int
    """Bytes of one token in kv records."""
    state_bytes: int
    """Bytes of one snapshot."""
    state_counts: tuple[int, ...] = ()
    """Arrays of each recurrent leaf in it."""
    loose: int = 0
    """Groups of keys and values, if the last is that of an MTP head which goes on from zeros behind a restored prefix;
    else 0."""

    @property
    def kept_as(self) -> str:
        """For the namespace: what a record of this format cannot be mistaken for."""
        steps = f"in steps of {self.layout.step}" if self.layout.step > 1 else ""
        return " ".join(filter(None, (self.dtype, self.form.packing.described(""), steps)))

    # --- cutting ----------------------------------------------------------------------------------------------

    def spans(self, leaves: Sequence[Arrays], kind: Kind) -> Stored:
        """Stack what a lane or a prompt returned, one entry per leaf, into a record; lazy."""
        arrays = []
        for group in self.groups[kind]:
            arrays += [_stacked(list(alike)) for alike in zip(*(leaves[leaf] for leaf in group), strict=True)]
        return Stored(arrays)

    def window_start(self, start: int, end: int) -> int:
        """First position that the window record of the block [start, end) holds."""
        return max(start, end - self.layout.window)

    # --- putting together -------------------------------------------------------------------------------------

    def restored(self, network: nn.Module, plan: RestorePlan, capacity: int, *, whole: bool = False) -> Prompt:
        """A prompt that holds the tokens of the plan, with room for ``capacity`` of them in all; lazy, but for what is
        packed.

        ``whole``: no forward will read behind them, so what is packed need not be unpacked.
        """
        prompt = new_prompt(network, self.form)
        prompt.length = plan.position
        room = max(0, capacity - plan.position)
        groups = self.groups[Kind.KV]
        held = {part.node: record(part.node.records[Kind.KV]).kept() for part in plan.parts if groups}
        for number, group in enumerate(groups):
            for place, leaf in enumerate(group):
                pieces = [
                    Piece(part.node.start, part.end, _layer(held[part.node], len(groups), (number, place), part.used))
                    for part in plan.parts
                ]
                self._fill(prompt, leaf, pieces, (0, 0 if whole and self.form.packs else room), whole=whole)
        self.put_windows(prompt, plan, whole=whole)
        self.put_states(prompt, plan)
        mx.eval([piece.arrays for pieces in prompt.pieces for piece in pieces])
        return prompt

    def put_windows(self, prompt: Prompt, plan: RestorePlan, *, whole: bool) -> None:
        """Fill the sliding layers of a prompt that holds the tokens of the plan; lazily, but for what is packed.
        ``whole``: no forward will read behind them."""
        held: dict[Node, Arrays] = {}
        """Each record's arrays, made once for all leaves."""
        for part in reversed(plan.parts if self.groups[Kind.WINDOW] else ()):
            if Kind.WINDOW not in part.node.records or part.end <= plan.position - self.layout.window:
                break
            held[part.node] = record(part.node.records[Kind.WINDOW]).kept()
        for number, group in enumerate(self.groups[Kind.WINDOW]):
            size = min(prompt.leaves[group[0]].window, plan.position)
            for place, leaf in enumerate(group):
                pieces = self._window_pieces(plan, held, (number, place), size)
                # The oldest of a full window is dropped before anybody looks at it; it may be missing here.
                self._fill(prompt, leaf, pieces, (size - (plan.position - pieces[0].start), 0), whole=whole)

    def put_states(self, prompt: Prompt, plan: RestorePlan) -> None:
        """The same of the recurrent layers."""
        states = self.groups[Kind.STATE]
        if states:
            arrays = list(record(plan.parts[-1].node.records[Kind.STATE]).kept())
            for (leaf,), count in zip(states, self.state_counts, strict=True):
                prompt.leaves[leaf].put(arrays[:count], plan.position)
                arrays = arrays[count:]

    def _window_pieces(
        self, plan: RestorePlan, held: Mapping[Node, Arrays], where: tuple[int, int], size: int
    ) -> list[Piece]:
        """What the window records hold of the last ``size`` tokens of one layer. ``where``: its group, and its place
        there."""
        pieces: list[Piece] = []
        begins = plan.position
        for part in reversed(plan.parts):
            if part.node not in held or begins <= plan.position - size:
                break
            held_from = self.window_start(part.node.start, part.node.end)
            begins = max(held_from, plan.position - size)
            span, groups = (part.end - held_from, begins - held_from), len(self.groups[Kind.WINDOW])
            arrays = _layer(held[part.node], groups, where, *span)
            pieces.insert(0, Piece(begins, part.end, arrays))
            if held_from > part.node.start:
                break
        return pieces

    def _fill(self, prompt: Prompt, leaf: int, pieces: list[Piece], around: tuple[int, int], *, whole: bool) -> None:
        """Put pieces into one layer of a prompt, with unused positions before and behind them."""
        floats = [piece for piece in pieces if piece.arrays[0].dtype != NUMBERS]
        packed = [piece for piece in pieces if piece.arrays[0].dtype == NUMBERS]
        if packed:
            together = Piece(packed[0].start, packed[-1].end, joined([piece.arrays for piece in packed]))
            behind = [piece for piece in floats if piece.start >= together.end]
            floats = [piece for piece in floats if piece.start < together.end]
            prompt.pieces[leaf] = [together]
            if whole:
                prompt.pieces[leaf] += behind
            else:
                unpacked = prompt.leaves[leaf].kept_as(self.form).unpack(together.arrays)
                floats += [Piece(together.start, together.end, unpacked), *behind]
        if floats:
            keys, values = (spaced([piece.arrays[side] for piece in floats], *around) for side in (0, 1))
            prompt.leaves[leaf].put((keys, values), prompt.length)


def agree(form: KvFormat, held: Payload, computed: Payload, *, loose: int = 0) -> bool:
    """Whether two records of the same block hold the same numbers, but for rounding. ``loose``: see BlockFormat; what
    such a head keeps need not be the same."""
    left, right = record(held).arrays, record(computed).arrays
    if loose:
        left, right = (arrays[: len(arrays) - len(arrays) // loose] for arrays in (left, right))
    if [(a.shape, a.dtype) for a in left] != [(b.shape, b.dtype) for b in right]:
        return False
    if left and left[0].dtype == NUMBERS:
        return _close_packed(form, left, right)
    return all(_close(a, b, 0.0) for a, b in zip(left, right, strict=True))


def _close_packed(form: KvFormat, left: Arrays, right: Arrays) -> bool:
    begins = [place for place, array in enumerate(left) if array.dtype == NUMBERS][::2]
    for first, end in zip(begins, [*begins[1:], len(left)], strict=True):
        kept = form.kept_in(left[first:end])
        steps = STEPS_APART / (2**kept.packing.bits - 1)
        sides = (kept.unpack(arrays[first:end]) for arrays in (left, right))
        if not all(_close(a, b, steps) for a, b in zip(*sides, strict=True)):
            return False
    return True


def _close(a: mx.array, b: mx.array, steps: float) -> bool:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.abs(a - b).max() <= (AGREEMENT + steps) * mx.abs(b).max()).item())


def _layer(arrays: Arrays, groups: int, where: tuple[int, int], end: int, start: int = 0) -> Arrays:
    """Positions [start, end) of one layer of a record, counted from the record's first; lazy views [1, heads, n, x]."""
    (group, place), count = where, len(arrays) // groups
    return tuple(array[place : place + 1, :, start:end] for array in arrays[group * count : (group + 1) * count])


def block_format(cache: PromptCache, form: KvFormat) -> BlockFormat | str:
    """The format for caches like this one, which a forward has filled; or why such caches cannot be cut into blocks.

    ``form``: how slots and records keep them.
    """
    leaves = leaves_of(cache)
    if strange := sorted({leaf.name for leaf in leaves if leaf.kind is None and leaf.name != CARRIED}):
        return f"its layers keep {', '.join(strange)}, which cannot be cut into blocks"
    groups: dict[Kind, dict[str, list[int]]] = {kind: {} for kind in Kind}
    layers, dtypes, state_counts, token_bytes, state_bytes = [], [], list[int](), 0, 0
    loose = bool(leaves) and leaves[-1].name == CARRIED
    for index, leaf in enumerate(leaves):
        if (kind := leaf.kind) is None:
            continue
        try:
            arrays = leaf.span(0, 1)
            if not any(array.size for array in arrays):
                continue  # it keeps nothing
            dtypes.append(_name(arrays[0].dtype))
            if form.packs and kind is not Kind.STATE:
                arrays = leaf.kept_as(form).one(*arrays)
        except (TypeError, ValueError) as error:
            return f"layer {index}: {error}"
        shape = " ".join(f"{_name(a.dtype)}{list(a.shape)}" for a in arrays)
        layers.append(f"{kind} {leaf.window} {shape}{' of a head' if loose and index == len(leaves) - 2 else ''}")
        nbytes = sum(int(a.nbytes) for a in arrays)
        state_bytes += nbytes if kind is Kind.STATE else 0
        state_counts += [len(arrays)] if kind is Kind.STATE else []
        token_bytes += nbytes if kind is Kind.KV else 0
        groups[kind].setdefault(f"{index}" if kind is Kind.STATE else layers[-1], []).append(index)
    windows = sorted({leaf.window for leaf in leaves} - {0})
    if len(windows) > 1 and windows[0] < BLOCK:
        return f"its sliding windows of {windows} tokens differ, and one is shorter than a block of {BLOCK}"
    return BlockFormat(
        form=form,
        layout=Layout(window=windows[-1] if windows else 0, state=bool(groups[Kind.STATE]), whole=form.rotated),
        groups={kind: list(alike.values()) for kind, alike in groups.items()},
        layers=tuple(layers),
        dtype=dtypes[0],
        token_bytes=token_bytes,
        state_bytes=state_bytes,
        state_counts=tuple(state_counts),
        loose=len(groups[Kind.KV]) if loose else 0,
    )


def cut_prompt(blocks: BlockFormat, prompt: Prompt, start: int, end: int, kind: Kind) -> Stored:
    """The record of the block [start, end) from a prompt; lazy. A snapshot is of now, whatever the block."""
    first = blocks.window_start(start, end) if kind is Kind.WINDOW else start
    return blocks.spans(prompt.spans(first, end, kind), kind)


def block_grid(start: int, end: int) -> Iterable[tuple[int, int]]:
    """The whole blocks that [start, end) completes: those that end in (start, end]."""
    return ((stop - BLOCK, stop) for stop in range((start // BLOCK + 1) * BLOCK, end + 1, BLOCK))


def _stacked(arrays: list[mx.array]) -> mx.array:
    """[1, ...] views as one array [n, ...] in a buffer of its own, lazily."""
    if len(arrays) == 1:  # concatenating a single array copies nothing
        return mx.take(arrays[0], mx.array([0], dtype=mx.int32), axis=0)
    return mx.concatenate(arrays, axis=0)


def spaced(pieces: Sequence[mx.array], front: int, back: int) -> mx.array:
    """[1, heads, n, dim] pieces one after the other, with unused positions before or behind them. Always a copy: the
    cache is written in place later, and must not share a block's buffer."""
    if len(pieces) == 1 and not front and not back:
        return mx.take(pieces[0], mx.array([0]), axis=0)  # assigning a whole array makes it a view of what is assigned
    (_, heads, _, dim), dtype = pieces[0].shape, pieces[0].dtype
    found = zeros((1, heads, front + sum(piece.shape[2] for piece in pieces) + back, dim), dtype)
    for piece in pieces:
        found[:, :, front : front + piece.shape[2]] = piece
        front += piece.shape[2]
    return found


def _dtype(name: str) -> mx.Dtype:
    dtype = getattr(mx, name, None)
    if not isinstance(dtype, mx.Dtype):
        raise ValueError(f"{name!r} is not an element type")
    return dtype


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
