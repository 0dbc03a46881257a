"""Layers that a model calls one after the other, with nothing in between: a step over all of them is one job in C.

MLX would run a job for each layer as well; but handing them over takes the engine's thread nearly as long as they run,
and the next step is built in that time. Engine thread only.
"""

from __future__ import annotations

import mlx.core as mx

from millpond.kv.rows import Forward
from millpond.native import layer


class LayerChain:
    """Those that wait until the last one is called: what they are to do, and what comes into the first."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._told: list[bytes] = []
        self._x: mx.array | None = None
        self._forward: Forward | None = None
        self._next = 0

    def begin(self) -> None:
        """The first layer is called: what a forward that failed has left is forgotten."""
        self._told, self._x = [], None

    def step(self, place: int, x: mx.array, told: bytes, forward: Forward) -> mx.array:
        """What layer number ``place`` makes of x float32 [rows, L, hidden], lazily; or x itself, which then has to be
        given to the next one. ``told``: see Known. Raises RuntimeError where something is done in between."""
        if self._told and not layer.fits(x.shape[-1], len(self._told) + 1, sum(map(len, self._told)) + len(told)):
            x = self.made(x)
        if self._told and (x is not self._x or place != self._next):
            raise RuntimeError(f"layer {place} is not given what comes into layer {self._next}")
        self._x, self._forward, self._next = x, forward, place + 1
        self._told.append(told)
        return self.made(x) if self._next == self._layers else x

    def made(self, x: mx.array) -> mx.array:
        """What those that wait make of x; of rows that hold nothing, zeros."""
        told, expected, forward = self._told, self._x, self._forward
        self.begin()
        if not told:
            return x
        if x is not expected or forward is None:
            raise RuntimeError(f"layer {self._next} is not given what comes into the layers before it")
        if forward.n == forward.rows:
            return layer.run(told, x)
        live = layer.run(told, x[: forward.n])
        return mx.concatenate([live, mx.zeros((forward.rows - forward.n, *x.shape[1:]))])
