"""What some of mlx-lm's model files compute as if all rows of a forward were equally long, computed for each of them.

``install`` gives the layers at hand a class of their own, which derives from mlx-lm's. Whether a model's rows are right
then is not decided here: the probe finds out, and a model that mlx-lm writes otherwise tomorrow runs solo. Engine
thread only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from millpond.kv.slots import KvSlot
from millpond.model.upstream import LayerCache

Methods = Mapping[str, Callable[..., object]]


def install(network: nn.Module) -> None:
    """Mend the layers of ``network`` that need it."""
    for module in network.modules():
        kind = type(module)
        mend = MENDS.get(f"{kind.__module__}.{kind.__name__}")
        if mend is not None:
            module.__class__ = type(kind.__name__, (kind,), {"__module__": __name__, **mend(kind)})


def _grouped_masks(kind: type[nn.Module]) -> Methods:
    """Gemma 2 scores the queries of each key head together, [n, heads, repeats, L, width]: a mask of rows, [n, 1, L,
    width], lacks an axis."""

    def call(self: nn.Module, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
        if mask is not None and mask.ndim == 4 and self.repeats > 1:
            mask = mask[:, :, None]
        return cast(mx.array, kind.__call__(self, x, mask, cache))

    return {"__call__": call}


def _placed_blocks(kind: type[nn.Module]) -> Methods:
    """MiniMax M3 chooses blocks of keys for each query, and takes its newest blocks by where the longest row ends."""

    def block_mask(
        self: nn.Module, x: mx.array, mask: mx.array | None, offset: int | mx.array, cache: LayerCache | KvSlot | None
    ) -> mx.array | None:
        if not isinstance(cache, KvSlot):
            return cast("mx.array | None", kind._block_mask(self, x, mask, offset, cache))
        n, length, _ = x.shape
        heads, dims, size = self.index_n_heads, self.index_head_dim, self.index_block_size
        keys = self.index_k_norm(self.index_k_proj(x).reshape(n, length, 1, dims)).transpose(0, 2, 1, 3)
        keys = self.index_rope(keys, offset=offset)
        keys, _ = cast(tuple[mx.array, mx.array], cache.update_and_fetch(keys, mx.zeros((n, 1, length, 0), keys.dtype)))
        width = int(keys.shape[2])
        blocks = -(-width // size)
        if blocks <= self.index_topk_blocks:
            return mask
        queries = self.index_q_norm(self.index_q_proj(x).reshape(n, length, heads, dims)).transpose(0, 2, 1, 3)
        queries = self.index_rope(queries, offset=offset)
        seen = mx.array(True) if mask is None else mask
        scores = queries.astype(mx.float32) @ keys.astype(mx.float32).swapaxes(-1, -2)
        scores = mx.where(seen, scores, -mx.inf)
        scores = mx.pad(scores, [(0, 0)] * 3 + [(0, blocks * size - width)], constant_values=-mx.inf)
        best = scores.reshape(n, heads, length, blocks, size).max(axis=-1)
        if self.index_local_blocks > 0:
            own = (cache.forward.positions // size)[:, None, :, None]
            block = mx.arange(blocks)
            best = mx.where((block <= own) & (block > own - self.index_local_blocks), mx.inf, best)
        chosen = mx.argpartition(-best, kth=self.index_topk_blocks - 1, axis=-1)[..., : self.index_topk_blocks]
        kept = mx.put_along_axis(mx.zeros(best.shape, dtype=mx.bool_), chosen, mx.array(True), axis=-1)
        kept = mx.repeat(kept, size, axis=-1)[..., :width] & seen
        return mx.repeat(kept, self.num_attention_heads // heads, axis=1)

    return {"_block_mask": block_mask}


class FollowingRotary(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Rotary embeddings of layers that attend to another one's keys."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = original
        self.follow: LayerCache | KvSlot | None = None
        """That one's cache."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if isinstance(self.follow, KvSlot):
            offset = self.follow.offset
        return cast(mx.array, self._original(x, offset=offset))


def _followed_offsets(kind: type[nn.Module]) -> Methods:
    """AFM's last layers attend to the keys of one before them, and take their own place from how many there are."""

    def call(self: nn.Module, inputs: mx.array, cache: Sequence[LayerCache | KvSlot] | None = None) -> mx.array:
        for layer in self.kv_reuse_layers:
            if not isinstance(layer.self_attn.rope, FollowingRotary):
                layer.self_attn.rope = FollowingRotary(layer.self_attn.rope)
            layer.self_attn.rope.follow = None if cache is None else cache[-1]
        try:
            return cast(mx.array, kind.__call__(self, inputs, cache))
        finally:
            for layer in self.kv_reuse_layers:
                layer.self_attn.rope.follow = None

    return {"__call__": call}


def _chunked_masks(kind: type[nn.Module]) -> Methods:
    """Llama 4 makes one mask for all layers that see their chunk of the positions only, from one length."""

    def call(self: nn.Module, inputs: mx.array, cache: Sequence[LayerCache | KvSlot] | None = None) -> mx.array:
        slots = [slot for slot in cache or () if isinstance(slot, KvSlot)]
        if not slots:
            return cast(mx.array, kind.__call__(self, inputs, cache))
        h = self.embed_tokens(inputs)
        for layer, slot in zip(self.layers, slots, strict=True):
            h = layer(h, slot.make_mask(inputs.shape[1]), cache=slot)
        return cast(mx.array, self.norm(h))

    return {"__call__": call}


def _placed_scales(kind: type[nn.Module]) -> Methods:
    """Llama 4 scales queries by their position, in layers without rotary embeddings."""

    def call(self: nn.Module, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
        if not isinstance(cache, KvSlot) or self.use_rope or not self.attn_temperature_tuning:
            return cast(mx.array, kind.__call__(self, x, mask, cache))
        n, length, _ = x.shape
        queries, keys, values = (
            project(x).reshape(n, length, heads, -1).transpose(0, 2, 1, 3)
            for project, heads in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        if self.use_qk_norm:
            queries, keys = (mx.fast.rms_norm(side, weight=None, eps=1e-6) for side in (queries, keys))
        steps = mx.floor((cache.forward.positions + 1) / self.floor_scale)
        scales = mx.log(steps + 1.0) * self.attn_scale + 1.0
        queries = (queries * scales[:, None, :, None]).astype(queries.dtype)
        keys, values = cache.update_and_fetch(keys, values)
        attend = vars(sys.modules[kind.__module__])["scaled_dot_product_attention"]
        mixed = attend(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return cast(mx.array, self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(n, length, -1)))

    return {"__call__": call}


MENDS: Mapping[str, Callable[[type[nn.Module]], Methods]] = {
    "mlx_lm.models.gemma2.Attention": _grouped_masks,
    "mlx_lm.models.minimax_m3_vl.Attention": _placed_blocks,
    "mlx_lm.models.afm7.AFMModel": _followed_offsets,
    "mlx_lm.models.llama4.LlamaModel": _chunked_masks,
    "mlx_lm.models.llama4.Attention": _placed_scales,
}
"""By mlx-lm's class."""
