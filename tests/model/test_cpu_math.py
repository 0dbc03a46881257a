"""Attention and SwiGLU of the CPU against MLX's own, in float32 rounding."""

from __future__ import annotations

import mlx.core as mx
import pytest
from engine_driver import upstream_math
from tiny_models import build

from millpond.model.attention import install
from millpond.model.cpu_math import attention, gated
from millpond.model.upstream import upstream_attention, upstream_swiglu


def close(ours: mx.array, reference: mx.array) -> bool:
    return bool(mx.allclose(ours, reference, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("mask", [None, "causal", "rows", "heads", "additive"])
@pytest.mark.parametrize(
    ("n", "heads", "groups", "length", "width"), [(1, 4, 4, 1, 9), (3, 6, 2, 5, 40), (2, 4, 1, 33, 33)]
)
def test_attention_equals_mlx(mask: str | None, n: int, heads: int, groups: int, length: int, width: int) -> None:
    mx.random.seed(1)
    queries = mx.random.normal((n, length, heads, 16)).transpose(0, 2, 1, 3) * 3
    keys, values = (mx.random.normal((n + 1, groups, width + 7, dim))[:n, :, :width] for dim in (16, 24))
    seen: mx.array | str | None = mask
    if mask == "rows":
        seen = (mx.random.uniform(shape=(n, 1, length, width)) > 0.3).at[..., 0].add(True)
    elif mask == "heads":
        seen = (mx.random.uniform(shape=(n, heads, length, width)) > 0.3).at[..., 0].add(True)
    elif mask == "additive":
        seen = mx.random.normal((length, width))
    ours = attention(queries, keys, values, None, 0.25, seen)
    assert close(ours, upstream_attention(queries, keys, values, None, 0.25, seen))


def test_extreme_scores_stay_finite() -> None:
    queries, keys = mx.full((1, 1, 1, 4), 1e4), mx.array([[[[1e3] * 4, [-1e3] * 4, [0.0] * 4]]])
    values = mx.array([[[[1.0], [2.0], [3.0]]]])
    assert attention(queries, keys, values, None, 1.0, None).item() == 1.0


def test_half_precision_goes_to_mlx() -> None:
    queries, keys, values = (mx.random.normal((1, 2, 3, 8)).astype(mx.float16) for _ in range(3))
    ours = attention(queries, keys, values, None, 0.3, "causal")
    assert ours.dtype == mx.float16
    assert mx.array_equal(ours, upstream_attention(queries, keys, values, None, 0.3, "causal"))


def test_gated_equals_mlx() -> None:
    gate = mx.concatenate([mx.random.normal((3, 50)) * 5, mx.array([[0.0, -100.0, 100.0, 88.8, -88.8] * 10])])
    x = mx.random.normal(gate.shape)
    assert close(gated(gate, x), upstream_swiglu(gate, x))
    assert mx.array_equal(
        gated(gate.astype(mx.float16), x.astype(mx.float16)),
        upstream_swiglu(gate.astype(mx.float16), x.astype(mx.float16)),
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "deepseek_v2", "lfm2"])
def test_a_networks_logits_stay_the_same(kind: str) -> None:
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6] * 5])
    network = build(kind)
    install(network)
    ours = network(tokens)
    with upstream_math():
        reference = network(tokens)
    assert mx.allclose(ours, reference, rtol=1e-3, atol=1e-3)
