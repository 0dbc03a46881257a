"""How much memory a model's weights will take, from the heads of its files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

FLOAT_BYTES = 4
MOST_MEMORY_SHARE = 0.8
"""On a CPU weights are held as float32 unless that takes more of the memory than this."""
LARGEST_HEAD = 100 * 2**20
PACKED = "U32"
"""Type of the words that hold quantised weights."""


class Tensor(TypedDict):
    """Of a safetensors head, what is read here."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class UnreadableWeights(Exception):  # noqa: N818 - names what was found
    """The message says which file."""


def weight_bytes(folder: Path, on_cpu: bool, memory: int) -> int:
    """Bytes of the weights once loaded. Raises UnreadableWeights."""
    tensors = dict(pair for file in sorted(folder.glob("model*.safetensors")) for pair in _head(file))
    stored = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors.values())
    if not on_cpu:
        return stored
    floats = FLOAT_BYTES * sum(_numbers(tensors, _quantization(folder)))
    return floats if floats <= memory * MOST_MEMORY_SHARE else stored


def _head(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > LARGEST_HEAD:
                raise UnreadableWeights(f"{file} is not a safetensors file")
            head: dict[str, Tensor] = json.loads(opened.read(length))
    except OSError as error:
        raise UnreadableWeights(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnreadableWeights(f"{file} is not a safetensors file") from error
    yield from ((name, tensor) for name, tensor in head.items() if name != "__metadata__")


def _quantization(folder: Path) -> Mapping[str, object]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization")
    except (OSError, ValueError, AttributeError):  # the engine will say what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(tensors: Mapping[str, Tensor], quantization: Mapping[str, object]) -> Iterator[int]:
    """How many numbers each tensor stands for; scales and biases of packed weights are gone once those are unpacked."""
    packed = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor["dtype"] == PACKED}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        count = math.prod(tensor["shape"])
        if layer not in packed:
            yield count
        elif last == "weight":
            own = quantization.get(layer)
            bits = (own if isinstance(own, dict) else quantization).get("bits")
            yield count * 32 // bits if isinstance(bits, int) and bits > 0 else count
