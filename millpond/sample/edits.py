"""Changes to logits: repetition, presence and frequency penalties, logit_bias, and tokens that must not come.

A row's changes are a short table of (id, factor, addend); only those logits are gathered, changed and written back, and
no row pays for the length of another's table. Tables live on the host and grow by each new token alone. Ids outside the
vocabulary are left out: there is no such logit to change, and a scatter to it would write outside the array. What a
grammar forbids is most of a vocabulary, and is added as a row of its own: of 0 and -inf.

On the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from millpond.grammar.constraint import Bits
from millpond.types import SamplingParams

_ADDENDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_OF_BYTE = _ADDENDS.astype(np.float32)
"""What each of eight tokens gets, by the byte that says which of them may come: [256, 8]."""
_SPARE = 16
"""Entries that a table has room for at first beyond those it begins with; then it doubles."""


class Table(NamedTuple):
    """Logit ``ids[i]`` becomes (l / factor[i] if l > 0 else l * factor[i]) + addend[i]; no id comes twice."""

    ids: npt.NDArray[np.int32]
    factor: npt.NDArray[np.float32]
    addend: npt.NDArray[np.float32]


def without(table: Table | None, tokens: Sequence[int]) -> Table:
    """A table after which none of ``tokens``, each in the vocabulary and none twice, can be drawn."""
    ids = np.array(tokens, dtype=np.int32)
    if table is None:
        return Table(ids, np.ones(len(ids), dtype=np.float32), np.full(len(ids), -np.inf, dtype=np.float32))
    addend = table.addend.copy()
    addend[np.isin(table.ids, ids)] = -np.inf
    more = without(None, [token for token in tokens if token not in table.ids])
    joined = (np.concatenate(parts) for parts in zip((table.ids, table.factor, addend), more, strict=True))
    return Table(*joined)


class RowEdits:
    """Which logits of one row change, and how, after the tokens seen so far."""

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Sequence[int] = ()) -> None:
        self._params = params
        self._vocab_size = vocab_size
        biased = {token: bias for token, bias in params.logit_bias.items() if 0 <= token < vocab_size}
        seen = np.unique(np.array(prompt if params.repetition_penalty != 1.0 else (), dtype=np.int64))
        penalised = seen[(seen >= 0) & (seen < vocab_size)].tolist()
        self._slot = {token: slot for slot, token in enumerate(dict.fromkeys((*biased, *penalised)))}
        used, size = len(self._slot), len(self._slot) + _SPARE
        self._ids = np.zeros(size, dtype=np.int32)
        self._factor = np.ones(size, dtype=np.float32)
        self._addend = np.zeros(size, dtype=np.float32)
        self._times = np.zeros(size, dtype=np.int32)
        """How often each is in the answer."""
        self._ids[:used] = list(self._slot)
        self._addend[: len(biased)] = list(biased.values())
        self._factor[np.isin(self._ids[:used], penalised).nonzero()] = params.repetition_penalty

    @property
    def table(self) -> Table:
        """Views, good until the next ``take``."""
        used = len(self._slot)
        return Table(self._ids[:used], self._factor[:used], self._addend[:used])

    def take(self, token: int) -> None:
        """The answer has one more token. What follows is a function of the tokens alone, to the last bit."""
        if not 0 <= token < self._vocab_size:
            return
        params, slot = self._params, self._slot_of(token)
        self._times[slot] += 1
        self._factor[slot] = params.repetition_penalty
        bias, often = params.logit_bias.get(token, 0.0), params.frequency_penalty * int(self._times[slot])
        self._addend[slot] = np.float32(bias) - np.float32(often) - np.float32(params.presence_penalty)

    def copy(self) -> RowEdits:
        """One that goes its own way from here."""
        other = copy(self)
        other._slot = dict(self._slot)
        other._ids, other._times = self._ids.copy(), self._times.copy()
        other._factor, other._addend = self._factor.copy(), self._addend.copy()
        return other

    def _slot_of(self, token: int) -> int:
        """Where a token's entry is. It may be a new one in longer arrays: ask before you take hold of one of them."""
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._factor = np.concatenate([self._factor, np.ones_like(self._factor)])
            self._addend = np.concatenate([self._addend, np.zeros_like(self._addend)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._ids[slot] = token
        return slot


def apply(logits: mx.array, tables: Sequence[Table | None]) -> mx.array:
    """Changed copy of float32 logits [n, V] by a table for each row; rows without one keep every bit. Lazy."""
    used = [(row, table) for row, table in enumerate(tables) if table is not None and len(table.ids)]
    if not used:
        return logits
    rows, vocab_size = logits.shape
    flat = logits.reshape(rows * vocab_size)
    ids = mx.array(np.concatenate([table.ids + row * vocab_size for row, table in used]))
    factor = mx.array(np.concatenate([table.factor for _, table in used]))
    addend = mx.array(np.concatenate([table.addend for _, table in used]))
    old = flat[ids]
    new = mx.where(old > 0, old / factor, old * factor) + addend
    return mx.put_along_axis(flat, ids, new, axis=0).reshape(rows, vocab_size)


def restrict(logits: mx.array, allowed: Sequence[Bits | None]) -> mx.array:
    """Float32 logits [n, V] with -inf for tokens that a row's bits do not allow; rows without bits keep every bit.
    Lazy."""
    bound = [bits for bits in allowed if bits is not None]
    if not bound:
        return logits
    rows, vocab_size = logits.shape
    spelled = np.stack(bound).view(np.uint8)
    # Any byte has its entry; numpy's indexing takes twice as long because it asks.
    spread = np.take(_OF_BYTE, spelled, axis=0, mode="clip")
    addends = mx.array(spread.reshape(len(bound), -1)[:, :vocab_size])
    if len(bound) < rows:  # the others' is shared: a row of a large vocabulary is not worth making for each
        places = np.cumsum([bits is not None for bits in allowed]) - 1
        places[[bits is None for bits in allowed]] = len(bound)
        addends = mx.concatenate([addends, mx.zeros((1, vocab_size))])[mx.array(places.astype(np.int32))]
    return logits + addends
