"""How keys and values are kept: as computed, or packed to a few bits with a scale and a bias per group."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from millpond.native import packing
from millpond.native.packing import TILE
from millpond.types import UNPACKED, KvPacking

Arrays = tuple[mx.array, ...]
"""Keys and values of one segment of positions: two arrays as computed, or when packed three for each; where keys are
rotated, a fourth one for them."""
Sides = tuple[Arrays, Arrays]
"""All arrays of the keys, and all of the values."""
WINDOW_BITS = 8
"""Of windows where what does not slide is rotated: they forget what a tile would be worth."""


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

    @property
    def rotated(self) -> bool:
        """Only whole tiles of TILE positions are packed: see docs/decisions/0056-rotated-keys-in-tiles.md."""
        return self.packing.rotated

    def windows(self) -> KvFormat:
        """How the same server keeps what slides."""
        return (
            replace(self, packing=KvPacking(bits=WINDOW_BITS, group_size=self.packing.group_size))
            if self.rotated
            else self
        )

    def kept_in(self, arrays: Arrays) -> KvFormat:
        """Which of the two has packed these."""
        keys, values = sides_of(arrays)
        return self if len(keys) > len(values) else self.windows()

    def end(self, length: int) -> int:
        """Of ``length`` positions those before this one are in whole tiles, or are never packed."""
        return max(self.packing.start, length // TILE * TILE) if self.rotated else length

    def pack(self, keys: mx.array, values: mx.array) -> Arrays:
        """Numbers uint32 [..., d * bits / 32], scales and biases [..., d / group] of keys, then the same of values.

        Of tiles, [..., tiles * TILE, d], what belongs to the keys has a fourth array, [..., d / TILE rounded up]: their
        means, those of a tile one after the other over its positions.
        """
        if not self.rotated:
            return (*self._packed(keys), *self._packed(values))
        return (*self._packed_tiles(keys), *self._packed(values))

    def one(self, keys: mx.array, values: mx.array) -> Arrays:
        """What the arrays [..., 1, d] of a position look like when they are packed."""
        if not self.rotated:
            return self.pack(keys, values)
        return tuple(
            array[..., :1, :] for array in self.pack(*(mx.repeat(side, TILE, axis=-2) for side in (keys, values)))
        )

    def _packed(self, side: mx.array) -> Arrays:
        bits, size = self.packing.bits, self.packing.group_size
        if not side.shape[-1]:
            return (mx.zeros(side.shape, mx.uint32), mx.zeros(side.shape, side.dtype), mx.zeros(side.shape, side.dtype))
        return packing.pack(side, bits, size) if self.native else tuple(mx.quantize(side, size, bits))

    def _packed_tiles(self, keys: mx.array) -> Arrays:
        bits, size = self.packing.bits, self.packing.group_size
        if self.native:
            return packing.pack_tiles(keys, bits, size)
        *outer, count, dims = keys.shape
        tiles = turned(keys).reshape(*outer, count // TILE, TILE, dims)
        means = tiles.astype(mx.float32).mean(axis=-2).astype(keys.dtype)
        apart = (tiles - means[..., None, :]).reshape(keys.shape)
        share = -(-dims // TILE)
        spare = mx.zeros((*outer, count // TILE, share * TILE - dims), keys.dtype)
        spread = mx.concatenate([means, spare], axis=-1).reshape(*outer, count, share)
        return (*mx.quantize(apart, size, bits), spread)

    def unpack(self, arrays: Arrays) -> tuple[mx.array, mx.array]:
        """Keys and values [..., d], in the element type they were computed in."""
        keys, values = sides_of(arrays)
        return self._whole_tiles(keys) if len(keys) > len(values) else self._whole(keys), self._whole(values)

    def _whole(self, side: Arrays) -> mx.array:
        numbers, scales, biases = side
        bits, size = self.packing.bits, self.packing.group_size
        if not numbers.shape[-1]:
            return mx.zeros(numbers.shape, scales.dtype)
        if self.native:
            return packing.unpack((numbers, scales, biases), bits, size)
        return mx.dequantize(numbers, scales, biases, size, bits)

    def _whole_tiles(self, side: Arrays) -> mx.array:
        numbers, scales, biases, means = side
        if self.native:
            return packing.unpack_tiles((numbers, scales, biases, means), self.packing.bits, self.packing.group_size)
        apart = self._whole((numbers, scales, biases))
        *outer, count, dims = apart.shape
        tiles = apart.reshape(*outer, count // TILE, TILE, dims) + tile_means(means, dims)[..., None, :]
        return turned(tiles.reshape(apart.shape), back=True)

    def token_bytes(self, heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype) -> int:
        """Bytes of one position of one layer."""
        dims = key_dim + value_dim
        if not self.packs:
            return heads * dims * int(dtype.size)
        scale = mx.float16 if self.native else dtype
        scales = 2 * dims // self.packing.group_size + (-(-key_dim // TILE) if self.rotated else 0)
        return heads * (dims * self.packing.bits // 8 + scales * int(scale.size))


AS_COMPUTED = KvFormat()


def sides_of(arrays: Arrays) -> Sides:
    """What of the arrays of a segment belongs to keys, and what to values."""
    values = 1 if len(arrays) == 2 else 3
    return arrays[:-values], arrays[-values:]


def tile_means(means: mx.array, dims: int) -> mx.array:
    """The means of each tile, [..., tiles, dims], from how they are kept, [..., positions, share]."""
    *outer, count, share = means.shape
    return means.reshape(*outer, count // TILE, TILE * share)[..., :dims]


def turned(vectors: mx.array, *, back: bool = False) -> mx.array:
    """[..., d] times a Hadamard matrix over each stretch of the largest power of two that divides d, as tiles.h has it.

    Keys are turned; queries, and keys to be turned ``back``, by the other factor, so that products stay what they are.
    """
    dims = int(vectors.shape[-1])
    stretch = dims & -dims
    exponent = stretch.bit_length() - 1
    factor = 2.0 ** -(exponent // 2 if back else exponent - exponent // 2)
    apart = vectors.reshape(*vectors.shape[:-1], dims // stretch, stretch)
    return (apart @ (_signs(stretch) * factor).astype(vectors.dtype)).reshape(vectors.shape)


@functools.cache
def _signs(size: int) -> mx.array:
    """Sylvester's matrix of ones and minus ones: exact in every element type."""
    place = np.arange(size)
    odd = np.array([[bin(i & j).count("1") % 2 for j in place] for i in place])
    return mx.array(1 - 2 * odd, dtype=mx.float32)
