"""Layers of a CPU that multiply with weights as they are on disk (native/products): packed, or of half precision.

Everything else of a network is held in float32 there, as MLX's own products of other types run on one thread. Engine
thread only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx.utils import tree_flatten

from millpond.model.upstream import QuantizedSwitchLinear, SwitchLinear
from millpond.native import products
from millpond.native.library import INSTRUCTIONS, instructions, prepared
from millpond.native.products import Matrix, StandIn

FACTORS = ("weight", "scales", "biases")
READING = tuple(f"mlx_lm.models.{name}" for name in ("llama4_text", "minicpm", "muse_spark", "seed_oss"))
"""mlx-lm's files that multiply with a layer's weights themselves, or ask for their type."""


class _Multiplies(nn.Module):  # type: ignore[misc]  # mlx.nn has no types
    """What all have in common."""

    _stand_in: StandIn

    def _product(self, x: mx.array) -> mx.array:
        return products.product(self._stand_in, x)


class OwnLinear(_Multiplies):
    """x float32 [..., inputs] -> [..., outputs]."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self._product(x)
        return y + self.bias if "bias" in self else y


class OwnShardedToAll(_Multiplies):
    """The same, whose ranks' results are summed up."""

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self._product(x), group=self.group)
        return y + self.bias if "bias" in self else y


class OwnEmbedding(_Multiplies):
    """Rows of the weights in float32, and the product with all of them."""

    def __call__(self, x: mx.array) -> mx.array:
        if "scales" not in self:
            return cast(mx.array, self.weight[x].astype(mx.float32))
        biases = self.get("biases")
        # With factors in float32: what they make is then not rounded to their own type.
        scales = self.scales[x] if self.mode != "affine" else self.scales[x].astype(mx.float32)
        return mx.dequantize(
            self.weight[x],
            scales=scales,
            biases=None if biases is None else biases[x].astype(mx.float32),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x)


class OwnSwitch(_Multiplies):
    """x float32 [..., 1, inputs] and experts [..., results of each] -> [..., results, 1, outputs]."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rows, inputs = x.shape[:-2], x.shape[-1]
        if x.shape[-2] != 1:
            return cast(mx.array, super().__call__(x, indices, sorted_indices))
        results = mx.broadcast_shapes(rows, indices.shape)
        if rows not in (results, (*results[:-1], 1)):
            x = mx.broadcast_to(x, (*results, 1, inputs))
        indices = mx.broadcast_to(indices, results)
        y = products.gathered(self._stand_in, x.reshape(-1, inputs), indices.reshape(-1))
        y = y.reshape(*results, 1, -1)
        return y + mx.expand_dims(self.bias[indices], -2) if "bias" in self else y


OWN: Mapping[type[nn.Module], type[_Multiplies]] = {
    nn.Linear: OwnLinear,
    nn.QuantizedLinear: OwnLinear,
    distributed.AllToShardedLinear: OwnLinear,
    distributed.QuantizedAllToShardedLinear: OwnLinear,
    distributed.ShardedToAllLinear: OwnShardedToAll,
    distributed.QuantizedShardedToAllLinear: OwnShardedToAll,
    nn.Embedding: OwnEmbedding,
    nn.QuantizedEmbedding: OwnEmbedding,
    SwitchLinear: OwnSwitch,
    QuantizedSwitchLinear: OwnSwitch,
}


def stays(module: nn.Module) -> bool:
    """Whether products take its weights as they are."""
    if type(module) not in OWN or "global_scale" in module or not products.available():
        return False
    if "scales" in module:
        known = module.mode != "affine" or module.scales.dtype in products.TYPES
        return known and products.fits(module.weight.shape[-2], module.scales.shape[-1] * module.group_size)
    return module.weight.dtype in products.HALF and products.fits(*module.weight.shape[-2:])


def settle(network: nn.Module) -> None:
    """Have in float32 what does not stay as it is, lazily."""
    for module in network.modules():
        kept = FACTORS if stays(module) else ()
        for name, value in dict(module).items():
            if isinstance(value, mx.array) and name not in kept:
                module[name] = _widened(value)
            elif isinstance(value, list):
                module[name] = [_widened(item) if isinstance(item, mx.array) else item for item in value]


def _widened(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def divisible(network: nn.Module, ranks: int) -> bool:
    """Whether packed weights can be shared by so many, and stay as they are."""
    return all(
        module.scales.shape[-1] % ranks == 0
        and module.scales.shape[-1] // ranks * module.group_size % products.STEP == 0
        for module in network.modules()
        if "scales" in module and ranks > 1
    )


def reads_weights(network: nn.Module) -> bool:
    """Whether the model's own code does: it expects numbers in float32."""
    return any(type(module).__module__ in READING for module in network.modules())


def in_whole_numbers(network: nn.Module) -> bool:
    """Whether products of some layers round vectors to whole numbers."""
    shim = prepared()
    if shim is None or instructions(shim) != INSTRUCTIONS[-1]:
        return False
    return any(isinstance(module, _Multiplies) and "scales" in module for module in network.modules())


def float_bytes(network: nn.Module) -> int:
    """What all weights take in float32, packed ones unpacked."""
    count = sum(int(array.size) for _, array in tree_flatten(network.parameters()))
    for module in network.modules():
        if "scales" in module:
            packed = sum(int(module[name].size) for name in FACTORS if module.get(name) is not None)
            count += int(module.scales.size) * module.group_size - packed
    return 4 * count


def matrix_of(module: nn.Module) -> Matrix:
    """The weights of a layer."""
    if "scales" not in module:
        return Matrix(module.weight)
    biases = module.get("biases")
    return Matrix(module.weight, module.scales, biases, module.group_size, module.bits, module.mode)


def install(network: nn.Module) -> None:
    """Have the layers whose weights stay as they are multiply with them. Evaluates these; nothing may replace them."""
    for module in network.modules():
        if not stays(module):
            continue
        for name in FACTORS:
            if module.get(name) is not None:
                module[name] = mx.contiguous(module[name])
        module._stand_in = products.stand_in(matrix_of(module))
        kind = type(module)
        module.__class__ = type(kind.__name__, (OWN[kind], kind), {"__module__": __name__})
