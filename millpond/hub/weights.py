"""Which files of a model folder hold its weights, and what tensors they say they hold.

``model.safetensors.index.json`` decides where there is one: what lies beside the files that it names belongs to another
upload or another program. Loading, fingerprints, downloads and the doctor all go by this list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from millpond.hub.errors import SourceError

INDEX = "model.safetensors.index.json"
LARGEST_HEAD = 100 * 2**20
MOST_DIMENSIONS = 8
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}
"""Element types of safetensors files whose size is known."""


class WeightFiles(NamedTuple):
    """The files that hold a model's weights, in the order of their names."""

    used: list[Path]
    ignored: list[str]
    """Names of the safetensors files beside them."""
    places: Mapping[str, str]
    """Tensor name → file name as the index says; empty without an index."""


class WeightTensor(msgspec.Struct, frozen=True):
    """What a safetensors head says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]
    """First byte and the one behind the last, counted from the end of the head."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.data_offsets[1] - self.data_offsets[0]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_index_decoder = msgspec.json.Decoder(_Index)
_head_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_tensor_decoder = msgspec.json.Decoder(WeightTensor)


def weight_files(folder: Path) -> WeightFiles:
    """The files of ``folder`` that count; heads are not read. Raises SourceError when one is missing."""
    places = _places(folder / INDEX)
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if places:
        names = files_of_index(folder)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SourceError(
                f"{folder.name}: {INDEX} names {missing[0]!r}{_and_more(missing)}, which is not there: "
                "fetch the model again, or remove an index that belongs to other files"
            )
    else:
        names = [name for name in present if name.startswith("model")]
        if not names:
            beside = f"; it has {present[0]!r}{_and_more(present)}" if present else ""
            raise SourceError(f"{folder.name} has no model*.safetensors and no {INDEX}{beside}")
    return WeightFiles([folder / name for name in names], [name for name in present if name not in names], places)


def files_of_index(folder: Path) -> list[str]:
    """Names that the folder's index gives, there or not. Raises SourceError for an index that is none."""
    return sorted(set(_places(folder / INDEX).values()))


def _places(path: Path) -> dict[str, str]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SourceError(f"{INDEX} cannot be read: {error.strerror}") from error
    try:
        places = _index_decoder.decode(content).weight_map
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise SourceError(f"{INDEX} has no weight_map of tensor names to file names: {error}") from error
    for name in places.values():
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise SourceError(f"{INDEX} names {name!r}: only *.safetensors beside it are allowed")
    return places


def tensors_of(files: WeightFiles) -> dict[str, tuple[Path, WeightTensor]]:
    """Every tensor by name, with the file to take it from.

    Raises SourceError for a file that is damaged, for a tensor that two files hold and no index places, and for one
    that the index places where it is not.
    """
    found: dict[str, tuple[Path, WeightTensor]] = {}
    for file in files.used:
        for name, tensor in _head(file).items():
            if files.places.get(name, file.name) != file.name:
                continue
            if name in found:
                raise SourceError(
                    f"tensor {name!r} is in {found[name][0].name} and in {file.name}, and no {INDEX} places it: "
                    "remove the file that does not belong to the model"
                )
            found[name] = (file, tensor)
    missing = [name for name in files.places if name not in found]
    if missing:
        where = files.places[missing[0]]
        raise SourceError(
            f"{INDEX} says that tensor {missing[0]!r}{_and_more(missing)} is in {where}, which does not have it: "
            "fetch the model again"
        )
    return found


def _head(file: Path) -> dict[str, WeightTensor]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= min(LARGEST_HEAD, size - 8):
                raise SourceError(f"{file.name} is not a whole safetensors file: fetch the model again")
            content = opened.read(length)
    except OSError as error:
        raise SourceError(f"{file.name} cannot be read: {error.strerror}") from error
    try:
        entries = _head_decoder.decode(content)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor_decoder.decode(entry) for name, entry in entries.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise SourceError(f"{file.name} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        _check(file, name, tensor, size - 8 - length)
    return tensors


def _check(file: Path, name: str, tensor: WeightTensor, room: int) -> None:
    begin, end = tensor.data_offsets
    if not 0 <= begin <= end or any(n < 0 for n in tensor.shape) or len(tensor.shape) > MOST_DIMENSIONS:
        raise SourceError(f"{file.name}: tensor {name!r} has the shape {tensor.shape} and lies at {begin} to {end}")
    if end > room:
        raise SourceError(f"{file.name} ends before tensor {name!r} does: fetch the model again")
    bits = BITS.get(tensor.dtype)
    if bits is not None and math.prod(tensor.shape) * bits != 8 * tensor.size:
        raise SourceError(
            f"{file.name}: tensor {name!r} has {tensor.size} bytes, which is not {tensor.shape} of {tensor.dtype}"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights in memory: as they are stored, but for those of float8, which become bfloat16. Raises
    SourceError."""
    tensors = [tensor for _, tensor in tensors_of(weight_files(folder)).values()]
    return sum(tensor.size * (2 if tensor.dtype == "F8_E4M3" else 1) for tensor in tensors)
