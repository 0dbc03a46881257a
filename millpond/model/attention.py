"""Which attention a model's layers use: over slots in C, over slots that are packed in part, or over plain arrays.

mlx-lm's model files import their functions by name; ``install`` puts ours in their place, in this process, for the
model at hand. Engine thread only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from millpond.kv.format import Arrays, tile_means, turned
from millpond.kv.rotated import RotatedSlot
from millpond.kv.slots import KvSlot
from millpond.model import cpu_math, cuda_attention
from millpond.model.upstream import LayerCache, Mask, upstream_attention
from millpond.native import device
from millpond.native.packing import TILE

Attention = Callable[..., mx.array]


def install(network: nn.Module) -> None:
    """Make the model files that ``network`` is built from use our attention, and on a CPU our SwiGLU."""
    on_cpu = device.on_cpu()
    elsewhere = cuda_attention.attention if device.on_cuda() else upstream_attention
    ours = {"scaled_dot_product_attention": over(cpu_math.attention if on_cpu else elsewhere)}
    if on_cpu:
        ours["swiglu"] = cpu_math.gated
    names = {type(module).__module__ for module in network.modules()}
    for name in sorted(name for name in names if name.startswith("mlx_lm.models.")):
        for function, replacement in ours.items():
            if hasattr(sys.modules[name], function):
                setattr(sys.modules[name], function, replacement)


def over(arrays: Attention) -> Attention:
    """Attention that knows our slots; ``arrays`` does the rest. Arguments as mlx-lm's models give them."""

    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: LayerCache | KvSlot | None,
        scale: float,
        mask: Mask,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not isinstance(cache, KvSlot):
            return arrays(queries, keys, values, cache, scale, mask, sinks)
        live = queries[: cache.forward.n] if cache.forward.rows > cache.forward.n else queries
        if cache.spec.format.native or (len(cache.segments) > 1 and not cache.spec.format.unpacked):
            if sinks is not None:
                raise ValueError("slots of this kind know no attention sinks")
            if isinstance(cache, RotatedSlot) and not cache.spec.format.native:
                if mask is not cache.seen(cache.forward):
                    raise ValueError("attention over rotated keys knows no other masks")
                mixed = rotated_attention(live, cache, scale)
            elif not cache.spec.format.native:
                mixed = split_attention(live, cache, scale, mask)
            elif mask is not None:
                raise ValueError("attention over slots in C knows no masks")
            else:
                mixed = cache.attend(live, scale * cpu_math.LOG2_E)
        elif cache.forward.apart:
            mixed = row_by_row(arrays, live, cache, scale, sinks)
        else:
            return arrays(queries, keys, values, cache, scale, mask, sinks)
        rest = queries.shape[0] - live.shape[0]
        return mx.concatenate([mixed, mx.zeros((rest, *mixed.shape[1:]), mixed.dtype)]) if rest else mixed

    return attention


def row_by_row(arrays: Attention, queries: mx.array, slot: KvSlot, scale: float, sinks: mx.array | None) -> mx.array:
    """Attention of [n, H, L, D] in which a row's shapes, and with them its rounding, know nothing of its neighbours."""
    if slot.spec.format.packs:
        raise ValueError("packed keys and values are not attended to row by row")
    mixed = []
    for row, alone in enumerate(slot.forward.alone):
        keys, values = slot.held(row, alone)
        mask = slot.seen(alone)
        mixed.append(arrays(queries[row : row + 1], keys, values, None, scale, mask, sinks))
    return mx.concatenate(mixed)


def split_attention(queries: mx.array, slot: KvSlot, scale: float, mask: Mask) -> mx.array:
    """Attention of [n, H, L, D] over a slot whose first positions are as computed and whose others are packed."""
    (exact_keys, exact_values), (packed_keys, packed_values) = slot.sides()
    bits, size = slot.spec.format.packing.bits, slot.spec.format.packing.group_size
    n, heads, length, _ = queries.shape
    groups = slot.spec.heads
    together = (queries * scale).reshape(n, groups, heads // groups * length, -1)
    scores = together @ exact_keys[0].swapaxes(-1, -2)
    exact, width = int(exact_keys[0].shape[2]), slot.forward.width(slot.capacity)
    if width > exact:
        behind = mx.quantized_matmul(together, *_three(packed_keys), True, size, bits)
        scores = mx.concatenate([scores, behind], axis=-1)
    if mask is not None:
        assert isinstance(mask, mx.array)
        seen = mask[:, :, None] if mask.ndim == 4 else mask
        apart = scores.reshape(n, groups, heads // groups, length, width)
        scores = mx.where(seen, apart, -mx.inf).reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    mixed = weights[..., :exact] @ exact_values[0]
    if width > exact:
        mixed = mixed + mx.quantized_matmul(weights[..., exact:], *_three(packed_values), False, size, bits)
    return mixed.reshape(n, heads, length, -1)


def rotated_attention(queries: mx.array, slot: RotatedSlot, scale: float) -> mx.array:
    """Attention of [n, H, L, D] over rotated tiles and what is before and behind them."""
    (first_keys, first_values), (tiled_keys, tiled_values), (newest_keys, newest_values) = slot.sides()
    bits, size = slot.spec.format.packing.bits, slot.spec.format.packing.group_size
    n, heads, length, dims = queries.shape
    groups = slot.spec.heads
    together = (queries * scale).reshape(n, groups, heads // groups * length, dims)
    first, tiled = int(first_keys[0].shape[2]), int(tiled_keys[0].shape[2])
    scores = [together @ first_keys[0].swapaxes(-1, -2), together @ newest_keys[0].swapaxes(-1, -2)]
    if tiled:
        around = turned(together, back=True)
        of_means = around @ tile_means(tiled_keys[3], dims).swapaxes(-1, -2)
        apart = mx.quantized_matmul(around, *_three(tiled_keys[:3]), True, size, bits)
        scores.insert(1, apart + mx.repeat(of_means, TILE, axis=-1))
    joined = mx.concatenate(scores, axis=-1)
    seen = slot.seen(slot.forward)[:, :, None]
    in_heads = joined.reshape(n, groups, heads // groups, length, -1)
    masked = mx.where(seen, in_heads, -mx.inf).reshape(joined.shape)
    weights = mx.softmax(masked, axis=-1, precise=True)
    mixed = weights[..., :first] @ first_values[0] + weights[..., first + tiled :] @ newest_values[0]
    if tiled:
        amid = weights[..., first : first + tiled]
        mixed = mixed + mx.quantized_matmul(amid, *_three(tiled_values), False, size, bits)
    return mixed.reshape(n, heads, length, -1)


def _three(side: Arrays) -> tuple[mx.array, mx.array, mx.array]:
    numbers, scales, biases = side
    return numbers, scales, biases
