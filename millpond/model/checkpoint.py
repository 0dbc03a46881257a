"""Arrays of a checkpoint, and whether they are what the model's parameters need. Engine thread only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from millpond.hub.weights import WeightFiles, tensors_of

FLOAT8 = "F8_E4M3"
READABLE = ("F32", "F16", "BF16", FLOAT8, "F8_E8M0", "C64", "BOOL", *(f"{u}{n}" for u in "IU" for n in (8, 16, 32, 64)))
"""Types that MLX has an array for; the eight-bit floats become bytes."""
COMPUTED = "F16, BF16 and F32, F8_E4M3 with scales, and packed U32 with scales and a quantization entry in config.json"
MOST_NAMED = 3


class WrongWeightsError(Exception):
    """The weights are not this model's; the message names a tensor."""


def read_arrays(files: WeightFiles) -> tuple[dict[str, mx.array], dict[str, str]]:
    """All tensors as lazy arrays, and each one's type as its file names it.

    Raises SourceError or WrongWeightsError.
    """
    tensors = tensors_of(files)
    for name, (file, tensor) in tensors.items():
        if tensor.dtype not in READABLE:
            raise WrongWeightsError(f"tensor {name!r} in {file.name} is {tensor.dtype}: allowed are {COMPUTED}")
    arrays: dict[str, mx.array] = {}
    for file in files.used:
        held = _load(file)
        arrays |= {name: held[name] for name, (place, _) in tensors.items() if place == file}
    return arrays, {name: tensor.dtype for name, (_, tensor) in tensors.items()}


def _load(file: Path) -> Mapping[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def check_weights(given: Mapping[str, mx.array], wanted: Mapping[str, mx.array], dtypes: Mapping[str, str]) -> None:
    """Compare arrays by parameter name with the parameters of a model that is waiting for them.

    ``dtypes``: types by the names in the files, which mostly are those of parameters. Raises WrongWeightsError when a
    tensor has no parameter, a parameter no tensor, a shape differs, or integers are given for floats.
    """
    if extra := [name for name in given if name not in wanted]:
        raise WrongWeightsError(f"the model has no parameter for {_listed(extra)}")
    if missing := [name for name in wanted if name not in given]:
        raise WrongWeightsError(f"no tensor is there for {_listed(missing)}")
    for name, parameter in wanted.items():
        array = given[name]
        if array.shape != parameter.shape:
            raise WrongWeightsError(f"tensor {name!r} has the shape {array.shape}: the model needs {parameter.shape}")
        if _kind(array.dtype) != _kind(parameter.dtype) and mx.issubdtype(parameter.dtype, mx.floating):
            told = dtypes.get(name) or next((d for n, d in dtypes.items() if name.endswith(n) or n.endswith(name)), "")
            kind = told or str(array.dtype).removeprefix("mlx.core.")
            raise WrongWeightsError(
                f"tensor {name!r} is {kind}, where the model computes with floats: allowed are {COMPUTED}"
            )
        if parameter.dtype == mx.uint32 and array.dtype != mx.uint32:
            raise WrongWeightsError(f"tensor {name!r} is {dtypes.get(name, array.dtype)}: packed weights are U32")


def _kind(dtype: mx.Dtype) -> str:
    return "float" if mx.issubdtype(dtype, mx.floating) else "other"


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:MOST_NAMED])
    return f"{shown} and {len(names) - MOST_NAMED} more tensors" if len(names) > MOST_NAMED else f"tensor {shown}"
