"""What a model's weights take in float32 is known before they are unpacked."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tiny_models import build

from millpond.model.load import float_bytes
from millpond.model.upstream import dequantized


@pytest.mark.parametrize("bits", [None, 4, 8, 3])
def test_float_bytes_are_those_after_unpacking(bits: int | None) -> None:
    network = build("llama")
    if bits is not None:
        nn.quantize(network, group_size=32, bits=bits)
    told = float_bytes(network)
    assert told == 4 * sum(array.size for _, array in tree_flatten(dequantized(network).parameters()))
