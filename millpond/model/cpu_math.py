"""Attention and SwiGLU for the CPU, around MLX's slow exponential.

On x86 MLX computes exp, softmax and sigmoid one element at a time, about 65 million a second, which is half of a decode
step of 16 rows and most of a long prefill. Its power of two runs 2.5 times as fast, so both functions are written with
that one; results agree with MLX's within float32 rounding (docs/decisions/0009-cpu-attention.md has the figures).

On a GPU, and for what they do not cover, MLX's own are used; see model/attention.py. Engine thread only.
"""

from __future__ import annotations

import math

import mlx.core as mx

from millpond.model.tiled_attention import TILED_QUERIES, tiled, tiled_attention
from millpond.model.upstream import LayerCache, Mask, upstream_attention, upstream_swiglu

LOG2_E = 1.0 / math.log(2.0)
TWO = 2.0


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: LayerCache | None,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention of queries [n, H, L, D] over keys and values [n, G, K, D], G dividing H.

    ``mask`` is None, "causal", bool (True: seen) or additive float, broadcastable to [n, H, L, K].
    """
    if queries.dtype != mx.float32 or sinks is not None or hasattr(cache, "bits"):
        return upstream_attention(queries, keys, values, cache, scale, mask, sinks)
    n, heads, length, _ = queries.shape
    if length >= TILED_QUERIES and tiled(mask, queries, keys, values):
        return tiled_attention(queries, keys, values, scale * LOG2_E, mask)
    groups = keys.shape[1]
    # Queries that share a key head go into one product: fewer and larger ones.
    together = (queries * (scale * LOG2_E)).reshape(n, groups, heads // groups * length, -1)
    scores = together @ keys.swapaxes(-1, -2)
    if mask is not None:
        width = scores.shape[-1]
        scores = _masked(scores.reshape(n, groups, heads // groups, length, width), mask, groups)
        scores = scores.reshape(n, groups, heads // groups * length, width)
    weights = mx.power(TWO, scores - mx.max(scores, axis=-1, keepdims=True))
    mixed = (weights @ values) / mx.sum(weights, axis=-1, keepdims=True)
    return mixed.reshape(n, heads, length, -1)


def _masked(scores: mx.array, mask: mx.array | str, groups: int) -> mx.array:
    """Scores [n, G, H / G, L, K] with what is not seen at minus infinity."""
    length, width = scores.shape[-2:]
    if isinstance(mask, str):
        mask = mx.arange(width - length, width)[:, None] >= mx.arange(width)[None]
    elif mask.ndim == 4:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mx.unflatten(mask, 1, (groups, -1))
    return mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask * LOG2_E


def gated(gate: mx.array, x: mx.array) -> mx.array:
    """SwiGLU: silu(gate) * x, any equal shapes."""
    if gate.dtype != mx.float32:
        return upstream_swiglu(gate, x)
    product: mx.array = gate / (1.0 + mx.power(TWO, gate * -LOG2_E)) * x
    return product
