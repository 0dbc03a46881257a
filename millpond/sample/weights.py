"""Integer token weights: exact sums, exact cuts, exact draws.

A row's probabilities become integers, ``floor(2**40 * p / max p)``. Integer sums do not depend on the order of
addition, so neither the number of rows nor the device's reduction kernel can move a draw, cumulative sums are
monotonic, and a token of weight 0 can never be chosen. Tokens below 2**-40 of the likeliest lose their mass: at most
2**-22 of the total for 262144 of them.

Order between tokens is that of their *keys*, weight above reversed id, so keys are distinct and equal weights rank by
the lower id, as argmax does. A filter is then one number per row, the *cut*: tokens whose key is at least the cut stay.

Everything here is lazy and row by row. Runs on the thread that owns MLX.
"""

from __future__ import annotations

import math

import mlx.core as mx

from millpond.sample.noise import WORD_BITS

BLOCK = 128
"""Tokens per block; the width of all arrays here is a multiple of it."""
SCALE_BITS = 40
_SCALE = 1 << SCALE_BITS
_MAX_ID_BITS = 22
_FLOOR = -60.0
_LOG2_E = math.log2(math.e)


def padded(vocab_size: int) -> int:
    """Vocabulary size rounded up to whole blocks. Raises ValueError where keys would not fit 63 bits."""
    if not 0 < vocab_size <= 1 << _MAX_ID_BITS:
        raise ValueError(f"vocab_size is {vocab_size}; allowed: 1 to {1 << _MAX_ID_BITS}")
    return -(-vocab_size // BLOCK) * BLOCK


def inverse_temperature(temperature: float) -> float:
    """Factor for ``weigh``. Bounded, because 0 * inf would turn the likeliest token into NaN."""
    return min(_LOG2_E / temperature, 1e30)


def min_weight(min_p: float) -> int:
    """Least weight min_p lets through. Under the likeliest token's even for min_p = 1, on any device."""
    return min(math.ceil(min_p * _SCALE), _SCALE - (_SCALE >> 20))


def fraction_words(fraction: float) -> tuple[int, int]:
    """A fraction in [0, 1] as the two words ``scaled`` takes."""
    return divmod(int(fraction * (1 << 2 * WORD_BITS)), 1 << WORD_BITS)


def weigh(logits: mx.array, peak: mx.array, inverse: mx.array) -> mx.array:
    """Weights int64 [r, padded V] of float32 logits [r, V], their maximum [r, 1] and inverse temperatures [r, 1].

    ``power(2, x)`` instead of ``exp``: on x86 MLX computes it more than twice as fast. The floor keeps it away from
    subnormal results, which are several times slower still, and all weights under it are 0.
    """
    exponent = mx.maximum((logits - peak) * inverse, _FLOOR)
    weights = (mx.power(2.0, exponent) * float(_SCALE)).astype(mx.int64)
    return pad(weights, 0)


def pad(rows: mx.array, value: float) -> mx.array:
    """Fill the last axis of [r, V] with ``value`` up to whole blocks."""
    missing = -rows.shape[-1] % BLOCK
    if not missing:
        return rows
    return mx.concatenate([rows, mx.full((rows.shape[0], missing), value, dtype=rows.dtype)], axis=-1)


class SortKeys:
    """Packs values and token ids of a vocabulary into keys, and finds the largest of a row."""

    def __init__(self, vocab_size: int) -> None:
        self.width = padded(vocab_size)
        self.id_bits = max(1, (self.width - 1).bit_length())
        self._mask = (1 << self.id_bits) - 1
        self._reversed_ids = self._mask - mx.arange(self.width, dtype=mx.int64)

    def pack(self, values: mx.array) -> mx.array:
        """int64 [r, width] of values below 2**41 in magnitude → keys of the same shape."""
        return (values << self.id_bits) + self._reversed_ids

    def values(self, keys: mx.array) -> mx.array:
        return keys >> self.id_bits

    def ids(self, keys: mx.array) -> mx.array:
        return self._mask - (keys & self._mask)

    def largest(self, keys: mx.array, count: int) -> mx.array:
        """The ``count`` largest keys of each row [r, width], ascending: int64 [r, count].

        The ``count`` largest lie in the ``count`` blocks with the largest maxima, so for small counts only those are
        searched.
        """
        rows, width = keys.shape
        blocks = width // BLOCK
        if 2 * count < blocks:
            maxima = mx.max(keys.reshape(rows, blocks, BLOCK), axis=-1)
            heads = mx.partition(maxima, blocks - count, axis=-1)[:, blocks - count :]
            block = self.ids(heads) // BLOCK + mx.arange(rows, dtype=mx.int64)[:, None] * blocks
            keys = keys.reshape(rows * blocks, BLOCK)[block].reshape(rows, count * BLOCK)
            width = count * BLOCK
        if count < width:
            keys = mx.partition(keys, width - count, axis=-1)[:, width - count :]
        return mx.sort(keys, axis=-1)

    def nucleus_cut(self, keys: mx.array, fraction: mx.array, sort_width: int) -> mx.array:
        """Cut [r, 1] of the fewest largest keys of [r, width] whose weights reach ``fraction`` of the row's sum.

        A weighted quickselect of fixed shapes: split at the median, keep the half that holds the cut, so that all
        splits together cost two of the first, whatever the data. What is at most ``sort_width`` wide is sorted.
        """
        rows, width = keys.shape
        need = _share(mx.sum(self.values(keys), axis=-1, keepdims=True), fraction)
        first = mx.arange(rows, dtype=mx.int32) * 2
        while width > sort_width and width % 2 == 0:
            width //= 2
            keys = mx.partition(keys, width, axis=-1)
            upper = mx.sum(self.values(keys[:, width:]), axis=-1, keepdims=True)
            inside = upper >= need
            need = mx.where(inside, need, need - upper)
            keys = keys.reshape(2 * rows, width)[first + inside[:, 0]]
        keys = mx.sort(keys, axis=-1)
        return _cut_at(keys, self.values(keys), need)

    def ranked_cut(self, keys: mx.array, ranks: mx.array, fraction: mx.array) -> mx.array:
        """Cut [r, 1] of a nucleus within the ``ranks`` [r, 1] largest of ascending keys [r, c], ranks <= c."""
        count = keys.shape[-1]
        weights = self.values(keys) * (mx.arange(count) >= count - ranks)
        return _cut_at(keys, weights, _share(mx.sum(weights, axis=-1, keepdims=True), fraction))


def scaled(total: mx.array, fraction: mx.array) -> mx.array:
    """``floor(total * fraction)`` up to two units too low: int64 [r, 1] from total [r, 1] < 2**62, words [r, 2]."""
    high, low = total >> WORD_BITS, total & ((1 << WORD_BITS) - 1)
    coarse, fine = fraction[:, :1], fraction[:, 1:]
    return coarse * high + ((coarse * low + fine * high) >> WORD_BITS)


def draw(weights: mx.array, noise: mx.array) -> mx.array:
    """Inverse-CDF draw in id order: int32 [r] from weights [r, width] and noise words [r, 2].

    The token is the first whose cumulative weight exceeds noise * total; a block sum is searched first, then the block.
    Rows with a total of at least 1 give a token of positive weight; any other row (not finite) some id below width.
    """
    rows, width = weights.shape
    blocks = width // BLOCK
    by_block = weights.reshape(rows * blocks, BLOCK)
    sums = mx.sum(by_block, axis=-1).reshape(rows, blocks)
    upto = mx.cumsum(sums, axis=-1)
    target = scaled(upto[:, -1:], noise)
    block = _first_above(upto, target)
    rest = target - mx.take_along_axis(upto, block, axis=-1) + mx.take_along_axis(sums, block, axis=-1)
    chosen = by_block[mx.arange(rows, dtype=mx.int32) * blocks + block[:, 0]]
    within = _first_above(mx.cumsum(chosen, axis=-1), rest)
    return (block * BLOCK + within)[:, 0]


def _first_above(cumulative: mx.array, target: mx.array) -> mx.array:
    """First index int32 [r, 1] where a non-decreasing row exceeds its target. Counting needs no tie rule of argmax."""
    count = mx.sum(cumulative <= target, axis=-1, keepdims=True).astype(mx.int32)
    return mx.minimum(count, cumulative.shape[-1] - 1)


def _share(total: mx.array, fraction: mx.array) -> mx.array:
    """The mass a nucleus must reach: at least 1, so that it holds the likeliest token."""
    return mx.maximum(scaled(total, fraction), 1)


def _cut_at(keys: mx.array, weights: mx.array, need: mx.array) -> mx.array:
    """The largest of ascending keys [r, c] from which on the weights sum to at least ``need`` [r, 1]."""
    reached = mx.cumsum(weights, axis=-1, reverse=True) >= need
    last = mx.maximum(mx.sum(reached, axis=-1, keepdims=True).astype(mx.int32) - 1, 0)
    return mx.take_along_axis(keys, last, axis=-1)
