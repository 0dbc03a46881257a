"""Millpond's CPU attention, SwiGLU and rotary embeddings beside MLX's own: ms per call, best of several, one table.

    python benchmarks/cpu_math.py

The sizes are SmolLM2-135M's: 9 query heads, 3 key heads of 64, 1536 hidden units.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from millpond.model import blas

print(blas.prepare())

import mlx.core as mx  # noqa: E402 - the BLAS comes first
import mlx.nn as nn  # noqa: E402

from millpond.model.cpu_math import attention, gated  # noqa: E402
from millpond.model.rotary import Angles, SharedRotary  # noqa: E402
from millpond.model.upstream import upstream_attention, upstream_swiglu  # noqa: E402

HEADS, GROUPS, DIMS, HIDDEN = 9, 3, 64, 1536
REPEATS, CALLS = 7, 10
Call = Callable[[], mx.array]


def best(call: Call) -> float:
    """ms per call: the fastest of REPEATS evaluations of CALLS independent calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval([call() for _ in range(CALLS)])
        times.append(time.perf_counter() - start)
    return min(times) / CALLS * 1000


def show(name: str, ours: Call, theirs: Call) -> None:
    ours_ms, theirs_ms = best(ours), best(theirs)
    print(f"{name:44s} {ours_ms:8.3f} {theirs_ms:8.3f}   {theirs_ms / ours_ms:4.2f}x")


def attention_case(rows: int, length: int, width: int) -> None:
    queries = mx.random.normal((rows, length, HEADS, DIMS)).transpose(0, 2, 1, 3)
    keys, values = (mx.random.normal((rows, GROUPS, width + 56, DIMS))[:, :, :width] for _ in range(2))
    mask: mx.array | str | None = "causal"
    if length == 1:
        mask = mx.random.uniform(shape=(rows, 1, 1, width)) > 0.1 if rows > 1 else None
    mx.eval(queries, keys, values)
    show(
        f"attention, {rows} rows, {length} of {width} tokens",
        lambda: attention(queries, keys, values, None, 0.125, mask),
        lambda: upstream_attention(queries, keys, values, None, 0.125, mask),
    )


def gated_case(tokens: int) -> None:
    gate, x = (mx.random.normal((tokens, 1, HIDDEN)) for _ in range(2))
    mx.eval(gate, x)
    show(f"SwiGLU, {tokens} tokens", lambda: gated(gate, x), lambda: upstream_swiglu(gate, x))


def rotary_case(rows: int, length: int) -> None:
    x = mx.random.normal((rows, length, HEADS, DIMS)).transpose(0, 2, 1, 3)
    offset = mx.array([200] * rows)
    mx.eval(x, offset)
    theirs = nn.RoPE(DIMS, base=1e5)
    ours = SharedRotary(theirs, Angles(DIMS, 1e5, 1.0))
    show(f"rotary, {rows} rows, {length} tokens", lambda: ours(x, offset=offset), lambda: theirs(x, offset=offset))


print(f"{'':44s} {'ours ms':>8s} {'MLX ms':>8s}")
for sizes in ((1, 1, 200), (8, 1, 200), (16, 1, 200), (1, 64, 64), (1, 64, 1000), (1, 256, 256), (1, 256, 2000)):
    attention_case(*sizes)
for tokens in (1, 8, 16, 256):
    gated_case(tokens)
for rows, length in ((1, 1), (8, 1), (16, 1), (1, 256)):
    rotary_case(rows, length)
