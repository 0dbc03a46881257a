"""Quantised GGUF blocks against MLX's quantised triples: the same values, not nearly the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, ReaderField, ReaderTensor
from gguf.quants import dequantize, quantize

from millpond.hub.errors import SourceError
from millpond.hub.gguf_tensors import GROUP, mlx_name, pack, row_order, to_float

KEPT = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0]
FIELD = ReaderField(0, "tensor", [], [], [])


def tensor(kind: GGMLQuantizationType, rows: int, columns: int, scale: float = 1.0) -> ReaderTensor:
    values = (np.random.default_rng(rows).standard_normal((rows, columns)) * scale).astype(np.float32)
    data = quantize(values, kind)
    shape = np.array([columns, rows], np.uint64)
    return ReaderTensor("tensor", kind, shape, rows * columns, data.nbytes, 0, data, FIELD)


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 64), (48, 576)])
def test_the_same_values_bit_for_bit(kind: GGMLQuantizationType, rows: int, columns: int) -> None:
    source = tensor(kind, rows, columns)
    packed = pack(source)
    assert packed is not None
    ours = mx.dequantize(
        mx.array(packed.weight),
        mx.array(packed.scales).astype(mx.float32),
        mx.array(packed.biases).astype(mx.float32),
        group_size=GROUP,
        bits=packed.bits,
    )
    assert np.array_equal(np.array(ours), dequantize(source.data, kind))


def test_scales_that_overflow_are_not_kept() -> None:
    assert pack(tensor(GGMLQuantizationType.Q8_0, 2, 64, scale=60_000.0)) is None


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q5_0, GGMLQuantizationType.F16, GGMLQuantizationType.BF16])
def test_other_types_become_floats(kind: GGMLQuantizationType) -> None:
    source = tensor(kind, 4, 64)
    assert pack(source) is None
    assert to_float(source).shape == (4, 64)
    assert np.array_equal(to_float(source), dequantize(source.data, kind).reshape(4, 64))


def test_row_order_undoes_the_interleaving() -> None:
    heads, half = 3, 4
    wanted = np.arange(heads * 2 * half)
    stored = wanted.reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)
    order = row_order("llama", "model.layers.0.self_attn.q_proj", len(wanted), heads, 1)
    assert order is not None
    assert np.array_equal(stored[order], wanted)


def test_only_llama_interleaves_and_only_q_and_k() -> None:
    assert row_order("qwen2", "model.layers.0.self_attn.q_proj", 24, 3, 1) is None
    assert row_order("llama", "model.layers.0.self_attn.v_proj", 24, 3, 1) is None


def test_names() -> None:
    assert mlx_name("llama", "blk.3.ffn_norm.weight") == ("model.layers.3.post_attention_layernorm", "weight")
    assert mlx_name("gemma3", "blk.3.ffn_norm.weight") == ("model.layers.3.pre_feedforward_layernorm", "weight")
    assert mlx_name("llama", "output.weight") == ("lm_head", "weight")


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "rope.weight", "blk.0.ssm_a", "x"])
def test_a_tensor_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match="has no place"):
        mlx_name("llama", name)
