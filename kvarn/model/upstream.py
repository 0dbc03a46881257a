"""The only importer of mlx_lm: model classes, weights, and per-sequence caches. Engine thread only.

Everything Kvarn assumes about mlx-lm's caches is in this file; the probe checks at start that it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu as swiglu
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import dequantize_model, load_model

from kvarn.kv.arena import LayerRow, LayerSpec


class LayerCache(Protocol):
    """One layer's cache as mlx-lm's models use it; opaque to everybody but this file."""

    @property
    def state(self) -> object: ...


PromptCache = list[LayerCache]
Model = Callable[..., mx.array]
"""A model: (tokens int [n, L], cache=...) -> logits [n, L, vocab]."""


def load_weights(folder: Path) -> tuple[nn.Module, dict[str, object]]:
    """Load a local MLX folder lazily. Raises what mlx-lm raises for a folder it cannot read."""
    model, config = load_model(folder, lazy=True)
    return cast(nn.Module, model), cast(dict[str, object], config)


def dequantized(model: nn.Module) -> nn.Module:
    """Replace quantised layers by plain ones."""
    return cast(nn.Module, dequantize_model(model))


Mask = mx.array | str | None
"""What is seen: everything, "causal", or a bool or additive array."""

UPSTREAM_MATH = {"scaled_dot_product_attention": scaled_dot_product_attention, "swiglu": swiglu}
"""mlx-lm's own functions by the names under which its model files import them."""


def upstream_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: LayerCache | None,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's attention: queries [n, H, L, D] over keys and values [n, G, K, D]."""
    return cast(mx.array, scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks))


def upstream_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """mlx-lm's silu(gate) * x."""
    return cast(mx.array, swiglu(gate, x))


def new_cache(model: nn.Module) -> PromptCache:
    """Fresh per-sequence caches, one per layer."""
    return cast(PromptCache, make_prompt_cache(model))


def cache_kind(cache: LayerCache) -> str:
    """``kv``, ``window`` or the class name of a cache that slots cannot hold."""
    if type(cache) is KVCache:
        return "kv"
    if isinstance(cache, RotatingKVCache) and type(cache) is RotatingKVCache and cache.keep == 0:
        return "window"
    return type(cache).__name__


def cache_arrays(cache: PromptCache) -> list[mx.array]:
    """Every array held by a prompt's caches."""
    return [array for _, array in tree_flatten([layer.state for layer in cache]) if isinstance(array, mx.array)]


def cache_bytes(cache: PromptCache) -> int:
    """Bytes held by a prompt's caches."""
    return sum(array.nbytes for array in cache_arrays(cache))


def layer_specs(cache: PromptCache) -> list[LayerSpec]:
    """What each layer stores, read off caches that a forward has filled. Raises TypeError for other kinds."""
    specs = []
    for index, layer in enumerate(cache):
        if not isinstance(layer, KVCache | RotatingKVCache):
            raise TypeError(f"layer {index} keeps a {type(layer).__name__}")
        keys, values = layer.keys, layer.values
        window = layer.max_size if isinstance(layer, RotatingKVCache) else None
        specs.append(LayerSpec(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, window))
    return specs


def take_rows(cache: PromptCache) -> Iterator[LayerRow]:
    """Yield each layer of a finished prompt for adoption, dropping it from ``cache`` once it is copied."""
    for index, layer in enumerate(cache):
        if isinstance(layer, RotatingKVCache):
            # Between chunks the ring may be stored rotated; only its own method knows the order.
            keys, values = layer._temporal_order(layer.keys), layer._temporal_order(layer.values)
            kept = min(layer.offset, keys.shape[2], layer.max_size)
            yield LayerRow(keys[:, :, -kept:], values[:, :, -kept:])
        elif isinstance(layer, KVCache):
            yield LayerRow(*layer.keys_and_values())
        else:
            raise TypeError(f"layer {index}: {type(layer).__name__} has no rows to adopt")
        cache[index] = KVCache()
