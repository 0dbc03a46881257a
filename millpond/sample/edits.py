"""Changes to single logits: repetition, presence and frequency penalties and logit_bias.

A row's changes are a short table of (id, factor, addend); only those logits are gathered, changed and written back, and
no row pays for the length of another's table. Tables live on the host and grow by each new token alone. Ids outside the
vocabulary are left out: there is no such logit to change, and a scatter to it would write outside the array.

On the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from millpond.types import SamplingParams

_SPARE = 16
"""Entries that a table has room for at first beyond those it begins with; then it doubles."""


class Table(NamedTuple):
    """Logit ``ids[i]`` becomes (l / factor[i] if l > 0 else l * factor[i]) + addend[i]; no id comes twice."""

    ids: npt.NDArray[np.int32]
    factor: npt.NDArray[np.float32]
    addend: npt.NDArray[np.float32]


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
