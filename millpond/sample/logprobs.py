"""Log-probabilities of the model's own distribution, for the rows that ask.

Lazy; on the thread that owns MLX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from millpond.sample.weights import BLOCK, SortKeys, pad

_LOG2_E = math.log2(math.e)
_FLOOR = -100.0


@dataclass(frozen=True)
class Logprobs:
    """Natural-log probabilities at one position of each row. Rows that did not ask hold NaN and ids of -1.

    ``chosen`` float32 [n]; ``top_ids`` int32 [n, k] and ``top_values`` float32 [n, k], best first, equal ones by id.
    """

    chosen: mx.array
    top_ids: mx.array
    top_values: mx.array


def measure(logits: mx.array, peak: mx.array, tokens: mx.array, count: int, keys: SortKeys) -> Logprobs:
    """Log-probabilities of ``tokens`` int32 [r] and of the ``count`` likeliest, of float32 logits [r, V].

    ``peak`` [r, 1] is the rows' maximum.
    """
    rows = logits.shape[0]
    wide = pad(logits, -math.inf)
    powers = mx.power(2.0, mx.maximum((wide - peak) * _LOG2_E, _FLOOR))
    # Sums of sums: one float32 accumulator over a whole vocabulary would lose digits.
    mass = mx.sum(mx.sum(powers.reshape(rows, -1, BLOCK), axis=-1), axis=-1, keepdims=True)
    norm = peak + mx.log(mass)
    chosen = (mx.take_along_axis(logits, tokens[:, None], axis=-1) - norm)[:, 0]
    if count == 0:
        return Logprobs(chosen, mx.zeros((rows, 0), dtype=mx.int32), mx.zeros((rows, 0), dtype=mx.float32))
    best = keys.largest(keys.pack(_ordered(wide).astype(mx.int64)), count)[:, ::-1]
    ids = keys.ids(best).astype(mx.int32)
    return Logprobs(chosen, ids, mx.take_along_axis(wide, ids, axis=-1) - norm)


def spread(found: Logprobs, slots: mx.array) -> Logprobs:
    """Rows of ``found`` placed by ``slots`` int32 [n]; the slot after the last means nothing was asked."""
    count = found.top_ids.shape[-1]
    none = mx.full((1, count), math.nan, dtype=mx.float32)
    return Logprobs(
        mx.concatenate([found.chosen, mx.array([math.nan], dtype=mx.float32)])[slots],
        mx.concatenate([found.top_ids, mx.full((1, count), -1, dtype=mx.int32)])[slots],
        mx.concatenate([found.top_values, none])[slots],
    )


def _ordered(values: mx.array) -> mx.array:
    """int32 that compare as the float32 they come from: of negative floats all bits but the sign are inverted."""
    raw = values.view(mx.int32)
    return raw ^ ((raw >> 31) & 0x7FFFFFFF)
