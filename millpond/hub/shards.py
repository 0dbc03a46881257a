"""Write a checkpoint's arrays into safetensors files of bounded size, so that no model has to fit in memory at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from millpond.hub.errors import SourceError

SHARD_BYTES = 1 << 30
ALIGNMENT = 64
"""Where the data of a file starts: a multiple of this, so that it can be mapped as any type."""

_SAFETENSORS_TYPES = {"uint32": "U32", "float16": "F16", "bfloat16": "BF16"}

FloatType = Literal["float16", "bfloat16"]
AnyArray = npt.NDArray[np.generic]


class ShardWriter:
    """Collects arrays and writes one file whenever SHARD_BYTES are together. Use as a context.

    float32 arrays are written as ``floats``; every other type is written as it is. On a clean exit the files carry the
    names other programs expect (model.safetensors, or numbered ones with an index); after an error they are left as
    they are.
    """

    def __init__(self, folder: Path, floats: FloatType) -> None:
        self._folder = folder
        self._floats = floats
        self._pending: dict[str, tuple[str, AnyArray]] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
            self._name_shards()

    def add(self, name: str, array: AnyArray) -> None:
        """Take an array of uint32, float16 or float32; its bytes are kept until its shard is written.

        Raises SourceError when a value does not fit the float type.
        """
        dtype = array.dtype.name
        if dtype == "float32":
            dtype, array = self._floats, self._narrow(name, array.astype(np.float32, copy=False))
        self._pending[name] = (dtype, np.ascontiguousarray(array))
        self._pending_bytes += array.nbytes
        self._total_bytes += array.nbytes
        if self._pending_bytes >= SHARD_BYTES:
            self._flush()

    def _narrow(self, name: str, values: npt.NDArray[np.float32]) -> AnyArray:
        if self._floats == "bfloat16":
            return to_bfloat16(values)
        with np.errstate(over="ignore"):
            narrowed = values.astype(np.float16)
        if np.isinf(narrowed).any():
            raise SourceError(f"tensor {name} has values beyond float16: only values up to 65504 are allowed")
        return narrowed

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        write_safetensors(self._path(len(self._shards)), self._pending)
        self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self._folder / f"model-{number:05d}.safetensors"

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            self._path(1).rename(self._folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self._folder / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, arrays: dict[str, tuple[str, AnyArray]]) -> None:
    """Write name → (element type, array in little-endian memory order) as one safetensors file, synced to disk."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, (dtype, array) in arrays.items():
        end = offset + array.nbytes
        header[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, array in arrays.values():
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of finite values, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)
