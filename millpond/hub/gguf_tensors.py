"""From GGUF tensors to the arrays of an MLX checkpoint.

Q4_0, Q4_1 and Q8_0 blocks are affine already, 32 weights each, so they become MLX's (weight, scales, biases) without
any loss: the float32 product scale * q + bias is the value GGUF defines. Every other type becomes plain floats.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

from millpond.hub.errors import SourceError

GROUP = 32
"""Weights that share one scale and one bias."""

U8 = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[np.generic]


class Packed(msgspec.Struct, frozen=True):
    """One affine-quantised matrix: value = scales * q + biases.

    weight: uint32 [rows, columns * bits / 32], lowest bits first; scales and biases: float16 [rows, columns / 32].
    """

    weight: npt.NDArray[np.uint32]
    scales: npt.NDArray[np.float16]
    biases: npt.NDArray[np.float16]
    bits: int


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
}
_PLAIN_NORMS = {"ffn_norm": "post_attention_layernorm"}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


def mlx_name(arch: str, name: str) -> tuple[str, str]:
    """(module path, ``weight`` or ``bias``) of a GGUF tensor. Raises SourceError for one that has no place."""
    if match := _BLOCK.fullmatch(name):
        layer, part, kind = match.groups()
        place = _LAYER.get(part) or _NORMS.get(arch, _PLAIN_NORMS).get(part)
        if place is not None:
            return f"model.layers.{layer}.{place}", kind
    else:
        stem, _, kind = name.rpartition(".")
        if stem in _TOP and kind in ("weight", "bias"):
            return _TOP[stem], kind
    raise SourceError(f"GGUF tensor {name!r} has no place in a {arch} model")


def row_order(arch: str, module: str, rows: int, heads: int, kv_heads: int) -> npt.NDArray[np.intp] | None:
    """Rows of a q or k projection in the order MLX wants, or None when they are in it.

    Llama files interleave the two halves of each head, as their rotary embedding turns neighbours; ours turns element
    i with element i + head_dim / 2.
    """
    if arch != "llama" or not module.endswith(("q_proj", "k_proj")):
        return None
    count = heads if module.endswith("q_proj") else kv_heads
    return np.arange(rows).reshape(count, rows // count // 2, 2).swapaxes(1, 2).reshape(-1)


def pack(tensor: ReaderTensor) -> Packed | None:
    """The tensor as an affine-quantised matrix, or None when that would lose something."""
    build = _PACKERS.get(tensor.tensor_type)
    if build is None or len(tensor.shape) != 2:
        return None
    rows = int(tensor.shape[1])
    with np.errstate(over="ignore"):
        packed = build(np.ascontiguousarray(tensor.data).view(np.uint8), rows)
    finite = np.isfinite(packed.scales).all() and np.isfinite(packed.biases).all()
    return packed if finite else None


def to_float(tensor: ReaderTensor) -> npt.NDArray[np.float32]:
    """The tensor's values, float32, in row-major shape (outermost first)."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    return values.reshape(shape)


def _blocks(data: U8, rows: int, size: int) -> U8:
    return data.reshape(rows, -1, size)


def _half(blocks: U8, at: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0].astype(np.float16)


def _nibbles(blocks: U8, at: int) -> npt.NDArray[np.uint32]:
    """16 bytes hold the first 16 weights in their low and the others in their high nibbles; MLX wants them in order."""
    quads = blocks[:, :, at : at + 16]
    ordered = np.concatenate([quads & 0xF, quads >> 4], axis=2)
    pairs = (ordered[:, :, 0::2] | (ordered[:, :, 1::2] << 4)).astype(np.uint8)
    return _words(pairs)


def _words(data: U8) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(data).reshape(data.shape[0], -1).view("<u4").astype(np.uint32)


def _pack_q4_0(data: U8, rows: int) -> Packed:
    blocks = _blocks(data, rows, 18)
    scales = _half(blocks, 0)
    return Packed(_nibbles(blocks, 2), scales, scales * np.float16(-8), 4)


def _pack_q4_1(data: U8, rows: int) -> Packed:
    blocks = _blocks(data, rows, 20)
    return Packed(_nibbles(blocks, 4), _half(blocks, 0), _half(blocks, 2), 4)


def _pack_q8_0(data: U8, rows: int) -> Packed:
    blocks = _blocks(data, rows, 34)
    scales = _half(blocks, 0)
    # Signed to unsigned: adding 128 to a byte is flipping its top bit.
    return Packed(_words(blocks[:, :, 2:] ^ np.uint8(0x80)), scales, scales * np.float16(-128), 8)


_PACKERS: dict[GGMLQuantizationType, Callable[[U8, int], Packed]] = {
    GGMLQuantizationType.Q4_0: _pack_q4_0,
    GGMLQuantizationType.Q4_1: _pack_q4_1,
    GGMLQuantizationType.Q8_0: _pack_q8_0,
}

KEPT_TYPES = frozenset(_PACKERS)
"""Types that stay quantised."""
