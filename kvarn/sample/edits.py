"""Changes to single logits: repetition, presence and frequency penalties and logit_bias.

A row's changes are a short table of (id, factor, addend); only those logits are gathered, changed and written back.
Tables live on the host and follow a row's history by its new tokens alone. Ids outside the vocabulary are left out:
there is no such logit to change, and a scatter to it would write outside the array.

Owned by one BatchSampler, on the thread that owns MLX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kvarn.types import SamplingParams


class RowEdits:
    """Which logits of one row change, and how, after the tokens seen so far."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._clear()

    def _clear(self) -> None:
        self._slot: dict[int, int] = {}
        self._count = 0
        self.ids = np.zeros(16, dtype=np.int32)
        self.factor = np.ones(16, dtype=np.float32)
        self.addend = np.zeros(16, dtype=np.float32)
        self._seen = 0
        self._last = -1
        self._answered: set[int] = set()
        for token, bias in self._params.logit_bias.items():
            if 0 <= token < self._vocab_size:
                self.addend[self._slot_of(token)] = bias

    def __len__(self) -> int:
        return self._count

    def follow(self, history: Sequence[int], prompt_length: int) -> None:
        """Take in the tokens of ``history`` (prompt, then answer) that are new since the last call."""
        seen = self._seen
        if len(history) < seen or (seen and history[seen - 1] != self._last):
            self._clear()
            seen = 0
        if len(history) == seen:
            return
        split = max(seen, min(prompt_length, len(history)))
        self._add(history[seen:split], in_answer=False)
        self._add(history[split:], in_answer=True)
        self._seen, self._last = len(history), history[-1]

    def after(self, token: int) -> RowEdits:
        """A copy that has seen one more token of the answer."""
        copy = RowEdits(self._params, self._vocab_size)
        copy._slot, copy._count, copy._answered = dict(self._slot), self._count, set(self._answered)
        copy.ids, copy.factor, copy.addend = self.ids.copy(), self.factor.copy(), self.addend.copy()
        copy._add([token], in_answer=True)
        return copy

    def _add(self, tokens: Sequence[int], in_answer: bool) -> None:
        params = self._params
        if not in_answer and params.repetition_penalty == 1.0:
            return
        for token, times in Counter(tokens).items():
            if not 0 <= token < self._vocab_size:
                continue
            slot = self._slot_of(token)
            self.factor[slot] = params.repetition_penalty
            if in_answer:
                self.addend[slot] -= params.frequency_penalty * times
                if token not in self._answered:
                    self._answered.add(token)
                    self.addend[slot] -= params.presence_penalty

    def _slot_of(self, token: int) -> int:
        slot = self._slot.get(token)
        if slot is None:
            slot = self._slot[token] = self._count
            self._count += 1
            if slot == len(self.ids):
                self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
                self.factor = np.concatenate([self.factor, np.ones_like(self.factor)])
                self.addend = np.concatenate([self.addend, np.zeros_like(self.addend)])
            self.ids[slot] = token
        return slot


class LogitEdits:
    """The tables of all rows of a batch, applied to its logits in one gather and one scatter."""

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int) -> None:
        self._rows = [RowEdits(p, vocab_size) for p in params]
        self._follows = [p.needs_history for p in params]
        self._table = self._stack()

    def ahead(self, drafts: Sequence[Sequence[int]]) -> LogitEdits:
        """Tables for all tokens that may come: row by row, that of the next one and those behind each draft token."""
        found = LogitEdits((), 0)
        for row, follows, draft in zip(self._rows, self._follows, drafts, strict=True):
            found._rows.append(row)
            for token in draft:
                found._rows.append(found._rows[-1].after(token) if follows else row)
        found._follows = [False] * len(found._rows)
        found._table = found._stack()
        return found

    def follow(self, histories: Sequence[Sequence[int] | None], prompt_lengths: Sequence[int]) -> None:
        """Take in new tokens; histories of rows without penalties are not looked at. Raises ValueError if one lacks."""
        for index, (row, follows) in enumerate(zip(self._rows, self._follows, strict=True)):
            if not follows:
                continue
            history = histories[index]
            if history is None:
                raise ValueError(f"histories[{index}] is None; a row with penalties needs its tokens")
            row.follow(history, prompt_lengths[index])
        self._table = self._stack()

    def apply(self, logits: mx.array) -> mx.array:
        """Changed copy of float32 logits [n, V]; rows without a table keep every bit."""
        if self._table is None:
            return logits
        ids, factor, addend = self._table
        old = mx.take_along_axis(logits, ids, axis=-1)
        new = mx.where(old > 0, old / factor, old * factor) + addend
        return mx.put_along_axis(logits, ids, new, axis=-1)

    def _stack(self) -> tuple[mx.array, mx.array, mx.array] | None:
        width = max((len(row) for row in self._rows), default=0)
        if width == 0:
            return None
        shape = (len(self._rows), width)
        ids = np.zeros(shape, dtype=np.int32)
        factor = np.ones(shape, dtype=np.float32)
        addend = np.zeros(shape, dtype=np.float32)
        for index, row in enumerate(self._rows):
            used = len(row)
            for stacked, own in ((ids, row.ids), (factor, row.factor), (addend, row.addend)):
                stacked[index, :used] = own[:used]
                # The filling repeats the first entry: two writes to one place are harmless when they agree.
                stacked[index, used:] = own[0]
        return mx.array(ids), mx.array(factor), mx.array(addend)
