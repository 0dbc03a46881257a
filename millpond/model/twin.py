"""Other views of a loaded model, which share its weights: what is wrong with a batch shows in them sooner.

Half precision rounds so much that a position that is off by one can hide in it, and most windows are longer than any
prompt that a start can spare time for. Engine thread only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from millpond.model.upstream import empty_model

NARROW = 24
"""Tokens that a narrow model's windows have."""
WIDE = 128
"""Windows up to this stay: prompts can be longer."""
WINDOWS = re.compile(r"(sliding_|attention_|loop_)?window(_size)?|attention_chunk_size|index_topk")
"""Keys of config.json that say how far a token sees, on which no weight's shape depends."""
BLOCKS = {re.compile(r"(index|sparse)_block_size"): 8, re.compile(r"(index|sparse)_topk_blocks"): NARROW // 8}
"""The same for tokens that see some blocks of positions only: what a narrow model has at most."""


class Wide(nn.Embedding):  # type: ignore[misc]  # mlx.nn has no types
    """An embedding that hands out float32."""

    def __call__(self, tokens: mx.array) -> mx.array:
        embedded: mx.array = super().__call__(tokens)
        return embedded.astype(mx.float32)


class WideQuantized(nn.QuantizedEmbedding):  # type: ignore[misc]  # the same
    """The same, of packed weights."""

    def __call__(self, tokens: mx.array) -> mx.array:
        embedded: mx.array = super().__call__(tokens)
        return embedded.astype(mx.float32)


@contextmanager
def exact(network: nn.Module) -> Iterator[None]:
    """Within, ``network`` computes in float32 whatever its weights are: embeddings begin with that, and it spreads."""
    embeddings = [module for module in network.modules() if type(module) in (nn.Embedding, nn.QuantizedEmbedding)]
    kinds = [type(module) for module in embeddings]
    try:
        for module in embeddings:
            module.__class__ = WideQuantized if isinstance(module, nn.QuantizedEmbedding) else Wide
        yield
    finally:
        for module, kind in zip(embeddings, kinds, strict=True):
            module.__class__ = kind


def largest_bytes(network: nn.Module) -> int:
    """Of a weight that is multiplied in float32: what it takes then, for the moment."""
    arrays = (array for _, array in tree_flatten(network.parameters()))
    return max((4 * int(array.size) for array in arrays if mx.issubdtype(array.dtype, mx.floating)), default=0)


def narrow_config(config: Mapping[str, object]) -> dict[str, object] | None:
    """That of a model of the same weights whose windows are all narrow; None where it has no wide ones."""
    changed = False

    def narrowed(level: Mapping[str, object]) -> dict[str, object]:
        nonlocal changed
        found: dict[str, object] = {}
        for name, value in level.items():
            wide = isinstance(value, int) and not isinstance(value, bool) and value > WIDE
            if isinstance(value, dict):
                found[name] = narrowed(value)
            elif wide and WINDOWS.fullmatch(name):
                found[name], changed = NARROW, True
            elif isinstance(value, int) and (most := _most(name)) < value:
                found[name], changed = most, True
            else:
                found[name] = value
        return found

    result = narrowed(config)
    return result if changed else None


def _most(name: str) -> int:
    return min((most for names, most in BLOCKS.items() if names.fullmatch(name)), default=sys.maxsize)


def sharing(config: dict[str, object], network: nn.Module, divide: Callable[[nn.Module], None]) -> nn.Module:
    """A model of its own built by ``config``, with the weights and the layers of ``network``, divided as that is."""
    model = empty_model(config)
    divide(model)
    model.update_modules(network.leaf_modules())
    model.update(cast(dict[str, object], network.parameters()))
    return model
