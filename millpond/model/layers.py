"""Layers of a CPU that are computed in C as a whole, in steps over slots (native/layer): those of families whose layers
are norms, products with weights, rotated heads and a gate, in an order that is known here.

Whatever else such a layer is asked for, mlx-lm computes. Whether what is known is true of a model the probe finds out.
Engine thread only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from millpond.kv.slots import KvSlot
from millpond.model.chain import LayerChain
from millpond.model.cpu_math import LOG2_E
from millpond.model.packed_linear import matrix_of
from millpond.model.rotary import SharedRotary
from millpond.model.together import TogetherCache, caches_of
from millpond.model.written import expected, put, taken
from millpond.native import carried, layer
from millpond.native.layer import GELU, Layer, Norm
from millpond.native.products import STEP, TYPES, Matrix

LEAST_POSITIONS = 1024
"""Of the tables of rotations, which are made as long as rows become."""
CAUSAL = "causal"
"""The mask by which every token sees those before it."""
PLAIN = (nn.Linear, nn.QuantizedLinear)


class NotKnown(Exception):  # noqa: N818 - reads as the fact it states
    """A layer is not quite what its family's are."""


class Turns:
    """Cosines and sines of all positions, as one rotary module has them."""

    def __init__(self, rotary: nn.Module, rotated: int) -> None:
        self.rotated = rotated
        self._rotary = rotary
        self._tables: list[mx.array] = []

    def upto(self, positions: int) -> mx.array:
        """float32 [positions or more, rotated]; the same array until more are asked for than it has. Those before are
        kept: steps in flight read them, and they are no larger together than the newest."""
        if not self._tables or self._tables[-1].shape[0] < positions:
            count = max(LEAST_POSITIONS, 1 << math.ceil(math.log2(positions)))
            half = self.rotated // 2
            ones = mx.concatenate([mx.ones((half,)), mx.zeros((half,))])
            table = mx.contiguous(self._rotary(mx.broadcast_to(ones, (1, 1, count, self.rotated)))[0, 0])
            mx.eval(table)
            self._tables.append(table)
        return self._tables[-1]


class Known:
    """One layer, as C is told of it."""

    def __init__(self, parts: Layer, turns: Turns, heads: int, dims: int, scale: float) -> None:
        """``heads`` of queries, with so many numbers each."""
        groups = parts.key.outputs // dims
        self._kept = groups, dims, parts.value.outputs // groups
        self._parts = parts
        self._turns = turns
        self._heads = heads
        self._scale = scale * LOG2_E
        self._told_of: mx.array | None = None
        self._told = b""

    def takes(self, x: mx.array, mask: object, slot: object) -> bool:
        """Whether it is a step over slots that C knows: they say themselves what may be seen."""
        if mask is not None or not isinstance(slot, KvSlot) or not slot.spec.format.native or x.dtype != mx.float32:
            return False
        return layer.fits(x.shape[-1], 1, layer.told_bytes(slot.lengths()))

    def told(self, length: int, slot: KvSlot) -> bytes:
        """What C is told for a step of so many columns."""
        asked = slot.asked(self._heads, length, self._scale, writes=True)[carried.BEGIN_BYTES :]
        return self._upto(slot.forward.longest + length) + asked + slot.lengths()

    def _upto(self, positions: int) -> bytes:
        """What C is told of the layer, for so many positions."""
        table = self._turns.upto(positions)
        if self._told_of is not table:
            self._told_of, self._told = table, layer.described(self._parts, table, self._turns.rotated)
        return self._told

    def reads(self, x: mx.array, mask: object, cache: object) -> bool:
        """Whether prompts go on that C can read, and may: of each all of its past is seen."""
        found = caches_of(cache)
        if found is None or x.dtype != mx.float32 or len(found[0]) != x.shape[0] or not all(map(expected, found[0])):
            return False
        causal = mask is None if x.shape[1] == 1 else isinstance(mask, str) and mask == CAUSAL
        causal = causal or isinstance(cache, TogetherCache)
        return causal and layer.fits_prompts(x.shape[-1], len(found[0]))

    def read(self, x: mx.array, cache: object) -> mx.array:
        """x float32 [prompts, L, hidden] -> the same; keys and values are added to the prompts' caches."""
        found = caches_of(cache)
        assert found is not None
        caches, counts = found[0], found[1] or [int(x.shape[1])]
        told = self._upto(max(one.offset for one in caches) + int(x.shape[1]))
        into = [taken(one, count, *self._kept) for one, count in zip(caches, counts, strict=True)]
        y = layer.read(told, into, self._heads, self._scale, x)
        for one, place in zip(caches, into, strict=True):
            y = put(one, place, y)
        return y


class OwnBlock(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """A layer of mlx-lm's that is computed here where it can be."""

    _known: Known
    _chain: LayerChain
    _place: int
    """In the chain."""

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
        if self._place == 0:
            self._chain.begin()
        if self._known.takes(x, mask, cache):
            slot = cast(KvSlot, cache)
            return self._chain.step(self._place, x, self._known.told(int(x.shape[1]), slot), slot.forward)
        x = self._chain.made(x)
        if self._known.reads(x, mask, cache):
            return self._known.read(x, cache)
        return cast(mx.array, super().__call__(x, mask, cache))


def install(network: nn.Module) -> None:
    """Have the layers of ``network`` that are known computed in C. Evaluates their weights; nothing may replace
    those."""
    turns: dict[object, Turns] = {}
    for module in network.modules():
        kind = type(module)
        family = FAMILIES.get(f"{kind.__module__}.{kind.__name__}")
        if family is None:
            continue
        try:
            parts, scale = family(module), float(module.self_attn.scale)
            heads = int(module.self_attn.n_heads)
            turned = _turns(module.self_attn.rope, turns)
            module._known = Known(parts, turned, heads, parts.query.outputs // heads, scale)
        except (NotKnown, AttributeError, ValueError):
            continue  # mlx-lm's own remains
        module.__class__ = type(kind.__name__, (OwnBlock, kind), {"__module__": __name__})
        module._chain, module._place = LayerChain(1), 0
    for module in network.modules():
        found = getattr(module, "layers", None)
        for owned, blocks in groupby(found if isinstance(found, list) else (), lambda one: isinstance(one, OwnBlock)):
            chained = list(blocks) if owned else []
            chain = LayerChain(len(chained))
            for place, block in enumerate(chained):
                block._chain, block._place = chain, place


def _turns(rotary: nn.Module, known: dict[object, Turns]) -> Turns:
    """One for all layers that rotate alike."""
    if type(rotary) is SharedRotary:
        plain = rotary.original
        key: object = (plain.dims, plain.base, plain.scale)
        return known.setdefault(key, Turns(plain, plain.dims))
    kind = f"{type(rotary).__module__}.{type(rotary).__name__}"
    if kind not in ROTARIES or getattr(rotary, "traditional", False):
        raise NotKnown(f"rotations by {kind}")
    count, factor = ROTARIES[kind]
    dims, rates = int(getattr(rotary, count)), np.asarray(rotary._freqs).tobytes()
    return known.setdefault((kind, dims, rates, getattr(rotary, factor, 1.0)), Turns(rotary, dims))


def _norm(module: nn.Module, shift: float = 0.0) -> Norm:
    """``shift``: what the family's norms add to their weights."""
    weight = module.weight.astype(mx.float32) + shift if shift else module.weight.astype(mx.float32)
    mx.eval(weight)
    return Norm(mx.contiguous(weight), float(module.eps))


def _matrix(module: nn.Module, first: int = 0, end: int | None = None) -> Matrix:
    """Outputs [first, end) of a layer."""
    if not isinstance(module, PLAIN) or "global_scale" in module:
        raise NotKnown(f"products by {type(module).__name__}")
    matrix = matrix_of(module)
    if matrix.inputs % STEP or matrix.weight.dtype not in (mx.uint32, *TYPES):
        raise NotKnown(f"weights of {matrix.weight.dtype} and {matrix.inputs} inputs")
    bias = mx.contiguous(module.bias.astype(mx.float32)[first:end]) if "bias" in module else None
    return replace(matrix, bias=bias, first=first, end=end)


def _llama(block: nn.Module) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        before=_norm(block.input_layernorm),
        between=_norm(block.post_attention_layernorm),
        query=_matrix(attention.q_proj),
        key=_matrix(attention.k_proj),
        value=_matrix(attention.v_proj),
        output=_matrix(attention.o_proj),
        gate=_matrix(mlp.gate_proj),
        up=_matrix(mlp.up_proj),
        down=_matrix(mlp.down_proj),
    )


def _qwen3(block: nn.Module) -> Layer:
    return replace(_llama(block), queries=_norm(block.self_attn.q_norm), keys=_norm(block.self_attn.k_norm))


def _gemma3(block: nn.Module) -> Layer:
    return replace(
        _llama(block),
        before=_norm(block.input_layernorm, 1.0),
        attended=_norm(block.post_attention_layernorm, 1.0),
        between=_norm(block.pre_feedforward_layernorm, 1.0),
        done=_norm(block.post_feedforward_layernorm, 1.0),
        queries=_norm(block.self_attn.q_norm, 1.0),
        keys=_norm(block.self_attn.k_norm, 1.0),
        kind=GELU,
    )


def _phi3(block: nn.Module) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    queries, keys = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    inner = matrix_of(mlp.down_proj).inputs
    return Layer(
        before=_norm(block.input_layernorm),
        between=_norm(block.post_attention_layernorm),
        query=_matrix(attention.qkv_proj, 0, queries),
        key=_matrix(attention.qkv_proj, queries, queries + keys),
        value=_matrix(attention.qkv_proj, queries + keys),
        output=_matrix(attention.o_proj),
        gate=_matrix(mlp.gate_up_proj, 0, inner),
        up=_matrix(mlp.gate_up_proj, inner),
        down=_matrix(mlp.down_proj),
    )


FAMILIES: Mapping[str, Callable[[nn.Module], Layer]] = {
    "mlx_lm.models.llama.TransformerBlock": _llama,
    "mlx_lm.models.qwen2.TransformerBlock": _llama,
    "mlx_lm.models.qwen3.TransformerBlock": _qwen3,
    "mlx_lm.models.gemma3_text.TransformerBlock": _gemma3,
    "mlx_lm.models.phi3.TransformerBlock": _phi3,
}
"""Classes of mlx-lm's layers, and what makes of one what C is told."""
ROTARIES: Mapping[str, tuple[str, str]] = {
    "mlx_lm.models.rope_utils.Llama3RoPE": ("dims", "mscale"),
    "mlx_lm.models.rope_utils.YarnRoPE": ("dims", "mscale"),
    "mlx_lm.models.rope_utils.SuScaledRoPE": ("dim", "_scale"),
}
"""Classes of mlx-lm's rotations, whose rates are ``_freqs``; what of one says how many numbers of a head are rotated,
and what they are multiplied with, if they are."""
