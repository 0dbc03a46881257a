"""The CPU's rotary embeddings are MLX's own, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from tiny_models import build

from millpond.model.rotary import Angles, SharedRotary, share_angles


@pytest.mark.parametrize("offset", [0, 7, "rows"])
@pytest.mark.parametrize(("dims", "base", "scale"), [(64, 10_000.0, 1.0), (16, 1e6, 0.5)])
@pytest.mark.parametrize("length", [1, 4, 33])
def test_equals_mlx(offset: int | str, dims: int, base: float, scale: float, length: int) -> None:
    x = mx.random.normal((3, length, 4, dims)).transpose(0, 2, 1, 3)
    original = nn.RoPE(dims, traditional=False, base=base, scale=scale)
    shared = SharedRotary(original, Angles(dims, base, scale))
    start = mx.array([5, 900, 7000]) if offset == "rows" else offset
    for _ in range(2):  # the second call takes the tables of the first
        assert mx.array_equal(shared(x, offset=start), original(x, offset=start))


def test_partial_and_half_precision_heads_go_to_mlx() -> None:
    original = nn.RoPE(8)
    shared = SharedRotary(original, Angles(8, original.base, original.scale))
    wide, half = mx.random.normal((1, 2, 3, 16)), mx.random.normal((1, 2, 3, 8)).astype(mx.float16)
    assert mx.array_equal(shared(wide, offset=3), original(wide, offset=3))
    assert mx.array_equal(shared(half, offset=3), original(half, offset=3))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "deepseek_v2", "lfm2"])
def test_a_networks_logits_stay_the_same(kind: str) -> None:
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    plain, shared = build(kind), build(kind)
    share_angles(shared)
    assert mx.array_equal(plain(tokens), shared(tokens))
