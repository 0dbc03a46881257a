"""Rotary embeddings for the CPU: the angles are computed once per forward instead of once per layer, query and key.

MLX has no CPU kernel for them; it builds about fifteen small operations per call, which in a decode step of few rows
cost more than attention (docs/decisions/0008-cpu-rotary.md). Here a call is two products and a sum. On a GPU MLX's own
kernel stays. Engine thread only.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


class Angles:
    """cos and sin of the positions of one forward; all layers that rotate alike share one."""

    def __init__(self, dims: int, base: float, scale: float) -> None:
        self._rates = mx.exp(mx.arange(dims // 2, dtype=mx.float32) * (-math.log(base) / (dims // 2))) * scale
        self._key: tuple[int | mx.array, int] | None = None
        self._tables: tuple[mx.array, mx.array] | None = None

    def tables(self, offset: int | mx.array, length: int) -> tuple[mx.array, mx.array]:
        """Factors of x and of its swapped halves, [n or 1, 1, length, 2, dims / 2] each.

        ``offset`` is an int, or int32 [n] or []; one array object stands for one forward: it is compared by identity.
        """
        key = self._key
        if key is None or key[1] != length or not _same(key[0], offset):
            start = offset if isinstance(offset, int) else offset.reshape(-1, 1)
            positions = mx.arange(length, dtype=mx.int32) + start
            angles = positions.reshape(-1, 1, length, 1, 1).astype(mx.float32) * self._rates
            cos, sin = mx.cos(angles), mx.sin(angles)
            self._tables = mx.concatenate([cos, cos], axis=3), mx.concatenate([-sin, sin], axis=3)
            self._key = (offset, length)
        assert self._tables is not None
        return self._tables


def _same(one: int | mx.array, other: int | mx.array) -> bool:
    return one == other if isinstance(one, int) and isinstance(other, int) else one is other


class SharedRotary(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """Stands in for an ``nn.RoPE`` that rotates halves, not interleaved pairs."""

    def __init__(self, original: nn.RoPE, angles: Angles) -> None:
        super().__init__()
        self._original = original
        self._angles = angles

    @property
    def original(self) -> nn.RoPE:
        """What it stands in for."""
        return self._original

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate x [n, heads, length, dims] as at positions offset, offset + 1, ... Bit for bit what MLX computes."""
        if x.shape[-1] != self._original.dims or x.dtype != mx.float32:
            rotated: mx.array = self._original(x, offset=offset)
            return rotated
        cos, sin = self._angles.tables(offset, x.shape[2])
        halves = mx.unflatten(x, -1, (2, -1))
        return mx.flatten(halves * cos + halves[..., ::-1, :] * sin, -2, -1)


def share_angles(network: nn.Module) -> None:
    """Let all plain rotary modules of ``network`` share their angles."""
    shared: dict[tuple[int, float, float], Angles] = {}
    for _, module in network.named_modules():
        for name, child in list(module.children().items()):
            if type(child) is nn.RoPE and not child.traditional and child.dims % 2 == 0:
                key = (child.dims, child.base, child.scale)
                setattr(module, name, SharedRotary(child, shared.setdefault(key, Angles(*key))))
