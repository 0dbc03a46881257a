"""How large a model's weights are, from the heads of its files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from millpond.hub.weights import WeightTensor, tensors_of, weight_files

FLOAT_BYTES = 4
PACKED = "U32"
"""Type of the words that hold quantised weights."""


def weight_sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the weights as they are stored, and unpacked and in float32. Raises SourceError."""
    tensors = {name: tensor for name, (_, tensor) in tensors_of(weight_files(folder)).items()}
    stored = sum(tensor.size for tensor in tensors.values())
    return stored, FLOAT_BYTES * sum(_numbers(tensors, _quantization(folder)))


def _quantization(folder: Path) -> Mapping[str, object]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization")
    except (OSError, ValueError, AttributeError, RecursionError):  # the engine will say what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(tensors: Mapping[str, WeightTensor], quantization: Mapping[str, object]) -> Iterator[int]:
    """How many numbers each tensor stands for; scales and biases of packed weights are gone once those are unpacked."""
    packed = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == PACKED}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        count = math.prod(tensor.shape)
        if layer not in packed:
            yield count
        elif last == "weight":
            own = quantization.get(layer)
            bits = (own if isinstance(own, dict) else quantization).get("bits")
            yield count * 32 // bits if isinstance(bits, int) and bits > 0 else count
