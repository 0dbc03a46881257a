"""Attention on an NVIDIA GPU, whose fused kernel is made anew for every shape of its arguments: 50 to 70 ms each on an
H200, where reading a prompt of 100 tokens takes 10.

So few scores are computed with plain products, which take any shape; many with the fused kernel, at shapes rounded up
to a few. Which of them depends on shapes alone, so that a prompt that is read again is read the same way. What has no
fused kernel goes to mlx-lm's attention. Engine thread only.
"""

from __future__ import annotations

import mlx.core as mx

from millpond.model.upstream import LayerCache, Mask, upstream_attention

PLAIN_SCORES = 1 << 25
"""Most scores at once, of a chunk of a prompt: 64 MB in half precision, in each of the three forms they go through."""
FEW_QUERIES = 16
"""Decode steps and drafts that are verified have fewer in each row. Those with a mask are computed plainly however many
scores there are: another kernel would be made whenever the rows have grown or one has left."""
STEP = 256
"""Queries and keys of the fused kernel come in multiples of so many, or of a 16th of what there is."""
LARGEST_DIM = 128
"""Of a head that it takes."""


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: LayerCache | None,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """Arguments and result as of mlx-lm's ``scaled_dot_product_attention``."""
    n, heads, length, _ = queries.shape
    elsewhere = sinks is not None or (length == 1 and mask is None)
    if elsewhere or (isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] > 1):
        return upstream_attention(queries, keys, values, cache, scale, mask, sinks)
    masked = isinstance(mask, mx.array)
    if n * heads * length * keys.shape[2] <= PLAIN_SCORES or (masked and length < FEW_QUERIES):
        return plain_attention(queries, keys, values, scale, mask)
    if isinstance(mask, str) and _fused(queries, values):
        return rounded_attention(queries, keys, values, scale)
    return upstream_attention(queries, keys, values, cache, scale, mask, sinks)


def plain_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Two products and a softmax: [n, H, L, D] over [n, G, S, D]. The queries that share a key head are the rows of one
    product, so that keys and values are read once for all of them."""
    n, heads, length, dims = queries.shape
    groups, width = keys.shape[1:3]
    scores = (queries * scale).reshape(n, groups, heads // groups * length, dims) @ keys.swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = mx.arange(width - length, width, dtype=mx.int32)[:, None] >= mx.arange(width, dtype=mx.int32)
    if mask is not None:
        seen = mask[:, :, None] if mask.ndim == 4 else mask
        apart = scores.reshape(n, groups, heads // groups, length, width)
        hidden = mx.where(seen, apart, mx.finfo(scores.dtype).min) if mask.dtype == mx.bool_ else apart + seen
        scores = hidden.reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ values).reshape(n, heads, length, values.shape[-1])


def rounded_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Causal attention by the fused kernel, its last query seeing the last key. Keys are added behind, and as many
    queries, so that each still sees what it saw; then queries in front, which see less. Nobody reads what they find."""
    length, width = queries.shape[2], keys.shape[2]
    behind = _rounded_up(width) - width
    front = -(length + behind) % STEP
    if behind:
        keys, values = (mx.pad(side, [(0, 0), (0, 0), (0, behind), (0, 0)]) for side in (keys, values))
    else:
        keys, values = mx.contiguous(keys), mx.contiguous(values)  # the room behind them is part of the shape
    if front or behind:
        queries = mx.pad(queries, [(0, 0), (0, 0), (front, behind), (0, 0)])
    mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")
    return mixed[:, :, front : front + length]


def _rounded_up(width: int) -> int:
    step = STEP
    while step * 32 < width:
        step *= 2
    return -(-width // step) * step


def _fused(queries: mx.array, values: mx.array) -> bool:
    dims = (int(queries.shape[-1]), int(values.shape[-1]))
    return queries.dtype in (mx.float16, mx.bfloat16) and all(dim % 8 == 0 and dim <= LARGEST_DIM for dim in dims)
