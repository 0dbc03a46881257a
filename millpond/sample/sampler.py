"""Picks the next token of all live rows in one lazy graph.

A row's token depends on its own logits, parameters, seed and position only: rows are grouped by the work their own
parameters need, and the arithmetic that decides a draw is on integers (weights.py), so that neither the neighbours nor
their number can change it. Nothing is evaluated here, so the tokens can feed the next forward without a host sync.

Order: repetition penalty, presence and frequency penalties, logit_bias, what a grammar forbids, temperature, top_k,
top_p within the top_k, min_p against the likeliest token, then one inverse-CDF draw. Runs on the thread that owns MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from millpond.native import device
from millpond.sample.edits import apply, restrict
from millpond.sample.logprobs import Logprobs, measure, spread
from millpond.sample.noise import words
from millpond.sample.state import Filter, SamplingState
from millpond.sample.weights import SortKeys, draw, weigh
from millpond.types import TokenLogprob

_CPU_SORT_WIDTH = 1024


@dataclass(frozen=True)
class Picks:
    """What one call picked; all arrays are lazy until evaluated."""

    tokens: mx.array
    """int32 [n]."""
    bad: mx.array
    """bool [n]: the model's logits of this row held NaN or +inf, or nothing but -inf; its token means nothing."""
    logprobs: Logprobs | None
    """Present when some row asks."""

    def arrays(self) -> list[mx.array]:
        """Everything there is to evaluate."""
        extra = [] if self.logprobs is None else [self.logprobs.chosen, self.logprobs.top_ids, self.logprobs.top_values]
        return [self.tokens, self.bad, *extra]

    def logprobs_of(self, row: int, k: int) -> TokenLogprob:
        """Read one row's log-probabilities on the host, with its ``k`` likeliest tokens; evaluates what is not yet.

        Raises ValueError when no row asked, or none for as many as ``k``.
        """
        found = self.logprobs
        if found is None or k > found.top_ids.shape[-1]:
            raise ValueError(f"logprobs of {k} tokens are not there for row {row}: no row asked for as many")
        ids, values = (np.array(found.top_ids)[row, :k].tolist(), np.array(found.top_values)[row, :k].tolist())
        token, chosen = np.array(self.tokens)[row], np.array(found.chosen)[row]
        return TokenLogprob(int(token), float(chosen), list(zip(ids, values, strict=True)))


class BatchSampler:
    """Draws for a fixed set of rows; build a new one when the set changes."""

    def __init__(self, states: Sequence[SamplingState], vocab_size: int) -> None:
        """``states`` in row order; each call draws behind what they have taken by then. Raises ValueError for a
        vocabulary above 4194304 tokens."""
        self.states = tuple(states)
        self._vocab_size = vocab_size
        self._keys = SortKeys(vocab_size)
        params = [state.params for state in states]
        self._greedy = [row for row, p in enumerate(params) if p.greedy]
        self._groups = [
            _Group(kind, rows, [states[row] for row in rows], self._keys)
            for kind in Filter
            if (rows := [row for row, state in enumerate(states) if not params[row].greedy and state.filter is kind])
        ]
        order = self._greedy + [row for group in self._groups for row in group.rows]
        self._unsort = None if order == sorted(order) else mx.array(np.argsort(order).astype(np.int32))
        self._asking = [row for row, p in enumerate(params) if p.logprobs is not None]
        self._top = min(max((p.logprobs or 0 for p in params), default=0), vocab_size)

    def __call__(self, logits: mx.array, positions: Sequence[int]) -> Picks:
        """Pick one token per row.

        ``logits`` [n, V] of any float type. ``positions[i]`` is the index, in the whole sequence, of the token being
        drawn. Raises ValueError when the shapes or lengths do not fit.
        """
        rows = len(self.states)
        if logits.shape != (rows, self._vocab_size) or len(positions) != rows:
            raise ValueError(
                f"logits are {logits.shape} with {len(positions)} positions; expected {(rows, self._vocab_size)}"
            )
        logits = logits.astype(mx.float32)
        peak = mx.max(logits, axis=-1, keepdims=True)
        edited = apply(logits, [state.table for state in self.states])
        edited = restrict(edited, [state.allowed for state in self.states])
        edited_peak = peak if edited is logits else mx.max(edited, axis=-1, keepdims=True)
        tokens = self._pick(edited, edited_peak, positions)
        bad = mx.logical_not(mx.isfinite(peak[:, 0]))
        return Picks(tokens, bad, self._measure(logits, peak, tokens))

    def _pick(self, logits: mx.array, peak: mx.array, positions: Sequence[int]) -> mx.array:
        parts: list[mx.array] = []
        if self._greedy:
            parts.append(mx.argmax(_rows_of(logits, self._greedy), axis=-1).astype(mx.int32))
        for group in self._groups:
            own = _rows_of(logits, group.rows), _rows_of(peak, group.rows)
            noise = words([self.states[row].params.seed for row in group.rows], [positions[row] for row in group.rows])
            parts.append(group.draw(*own, mx.array(noise)))
        tokens = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return tokens if self._unsort is None else tokens[self._unsort]

    def _measure(self, logits: mx.array, peak: mx.array, tokens: mx.array) -> Logprobs | None:
        asking = self._asking
        if not asking:
            return None
        found = measure(
            _rows_of(logits, asking), _rows_of(peak, asking), _rows_of(tokens, asking), self._top, self._keys
        )
        if len(asking) == len(self.states):
            return found
        slots = np.full(len(self.states), len(asking), dtype=np.int32)
        slots[asking] = np.arange(len(asking))
        return spread(found, mx.array(slots))


class _Group:
    """The sampled rows whose cut is found in the same way, with their parameters stacked as [r, 1] or [r, 2]."""

    def __init__(self, kind: Filter, rows: list[int], states: list[SamplingState], keys: SortKeys) -> None:
        self.rows = rows
        self._kind = kind
        self._keys = keys
        self._inverse = mx.array([[state.inverse] for state in states], dtype=mx.float32)
        self._least = np.array([[state.least] for state in states], dtype=np.int64)
        self._fraction = mx.array(np.array([state.fraction for state in states], dtype=np.int64))
        self._ranks = mx.array([[state.ranks] for state in states], dtype=mx.int32)
        self._most = max(state.ranks for state in states)

    def draw(self, logits: mx.array, peak: mx.array, noise: mx.array) -> mx.array:
        """int32 [r] from the group's own logits [r, V], their maximum [r, 1] and noise words [r, 2]."""
        weights = weigh(logits, peak, self._inverse)
        tokens = draw(self._filter(weights), noise)
        # A row of NaN can end in the filling beyond the vocabulary; its token must still be one the model can embed.
        return mx.minimum(tokens, logits.shape[-1] - 1)

    def _filter(self, weights: mx.array) -> mx.array:
        """The weights with those outside top_k, top_p or min_p set to 0."""
        if self._kind is Filter.NONE:
            return weights * (weights >= mx.array(self._least)) if self._least.any() else weights
        keys = self._keys.pack(weights)
        if self._kind is Filter.TOP_P:
            cut = self._keys.nucleus_cut(keys, self._fraction, self._sort_width())
        else:
            cut = self._keys.ranked_cut(self._keys.largest(keys, self._most), self._ranks, self._fraction)
        return weights * (keys >= mx.maximum(cut, mx.array(self._least << self._keys.id_bits)))

    def _sort_width(self) -> int:
        """A GPU's partition is a sort, so halving first only pays on a CPU."""
        return _CPU_SORT_WIDTH if device.on_cpu() else self._keys.width


def _rows_of(array: mx.array, rows: list[int]) -> mx.array:
    return array if len(rows) == array.shape[0] else array[mx.array(rows, dtype=mx.int32)]
