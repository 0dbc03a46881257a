"""How keys and values are kept: as computed, or packed to a few bits with a scale and a bias per group."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from millpond.native import packing
from millpond.types import UNPACKED, KvPacking

Arrays = tuple[mx.array, ...]
"""Keys and values of one segment of positions: two arrays as computed, or three for each when packed."""


@dataclass(frozen=True)
class KvFormat:
    """Formats are part of the namespace of cached blocks: what one wrote another cannot read."""

    packing: KvPacking = UNPACKED
    native: bool = False
    """Attention over the running batch is computed in C, on a CPU; and so is packing, with scales of half precision."""

    unpacked: bool = False
    """Packed numbers are unpacked before they are multiplied, in each layer and step: a device may have no products
    with packed ones, and some models do their own arithmetic with keys and values."""

    @property
    def packs(self) -> bool:
        return self.packing.bits > 0

    def pack(self, keys: mx.array, values: mx.array) -> Arrays:
        """Numbers uint32 [..., d * bits / 32], scales and biases [..., d / group] of keys, then the same of values."""
        return (*self._packed(keys), *self._packed(values))

    def _packed(self, side: mx.array) -> Arrays:
        bits, size = self.packing.bits, self.packing.group_size
        if not side.shape[-1]:
            return (mx.zeros(side.shape, mx.uint32), mx.zeros(side.shape, side.dtype), mx.zeros(side.shape, side.dtype))
        return packing.pack(side, bits, size) if self.native else tuple(mx.quantize(side, size, bits))

    def unpack(self, arrays: Arrays) -> tuple[mx.array, mx.array]:
        """Keys and values [..., d], in the element type they were computed in."""
        keys, scales, biases, values, value_scales, value_biases = arrays
        return self._whole(keys, scales, biases), self._whole(values, value_scales, value_biases)

    def _whole(self, numbers: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        bits, size = self.packing.bits, self.packing.group_size
        if not numbers.shape[-1]:
            return mx.zeros(numbers.shape, scales.dtype)
        if self.native:
            return packing.unpack((numbers, scales, biases), bits, size)
        return mx.dequantize(numbers, scales, biases, size, bits)

    def token_bytes(self, heads: int, dims: int, dtype: mx.Dtype) -> int:
        """Bytes of one position of one layer, ``dims`` being those of a key and a value together."""
        if not self.packs:
            return heads * dims * int(dtype.size)
        scale = mx.float16 if self.native else dtype
        return heads * (dims * self.packing.bits // 8 + 2 * dims // self.packing.group_size * int(scale.size))


AS_COMPUTED = KvFormat()
