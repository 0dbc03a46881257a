"""Floats of eight bits in checkpoints: MLX has no such type and reads them as bytes, so they are widened here.

Where MLX has the packed format that the file is in (mxfp8, mxfp4, nvfp4) the bytes are left as they are. Engine thread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from millpond.model.checkpoint import FLOAT8, WrongWeightsError

SCALES = ("_scale_inv", "_scale")
"""What is added to a tensor's name to name its scales. Both multiply: the first is named after what it was made by."""
ACTIVATION_SCALES = ("input_scale", "activation_scale", "input_scale_inv", "k_scale", "v_scale", "output_scale")
"""Of quantised activations and caches, which here are not quantised."""
METHODS = "fp8, fbgemm_fp8, modelopt (FP8) and compressed-tensors (float-quantized, naive-quantized)"

Quantization = Mapping[str, object]
"""quantization_config, wherever a folder keeps it; empty where there is none."""


def quantization_of(config: Mapping[str, object], folder: Path) -> Quantization:
    """What a folder says of how its weights are packed. ``quantization`` is MLX's own word and comes first."""
    text = config.get("text_config")
    for level in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization", "quantization_config"):
            found = level.get(key)
            if isinstance(found, Mapping):
                return {"quant_method": "mlx", **found} if key == "quantization" else found
    try:
        found = json.loads((folder / "hf_quant_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def holds_float8(dtypes: Mapping[str, str]) -> bool:
    """Whether some tensor is made of eight-bit floats."""
    return FLOAT8 in dtypes.values()


def must_widen(quantization: Quantization) -> bool:
    """Whether eight-bit floats are weights that MLX has no packed format for.

    Raises WrongWeightsError for a method that is not known.
    """
    method = quantization.get("quant_method", "" if not quantization else "modelopt")
    if method in ("mlx", "mxfp8", "mxfp4"):
        return False
    if method == "fp8":
        packed = quantization.get("scale_fmt") == "ue8m0" and block_of(quantization) == (32, 32)
        return not packed
    if method == "compressed-tensors":
        return quantization.get("format") in ("float-quantized", "naive-quantized")
    if method == "modelopt":
        inner = quantization.get("quantization", quantization)
        return isinstance(inner, Mapping) and inner.get("quant_algo") in (
            "FP8",
            "FP8_PB_WO",
            "FP8_PER_CHANNEL_PER_TOKEN",
        )
    if method in ("", "fbgemm_fp8"):
        return True
    raise WrongWeightsError(f"quantization_config: {method!r} with {FLOAT8} weights: allowed are {METHODS}")


def block_of(quantization: Quantization) -> tuple[int, ...] | None:
    """Rows and columns that share a scale, where that is said."""
    block = quantization.get("weight_block_size")
    groups = quantization.get("config_groups")
    if block is None and isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        block = next((w.get("block_structure") for w in weights if isinstance(w, Mapping)), None)
    if isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return tuple(int(n) for n in block)
    return None


def widen_float8(
    arrays: dict[str, mx.array], dtypes: Mapping[str, str], block: tuple[int, ...] | None
) -> dict[str, mx.array]:
    """The arrays with every F8_E4M3 matrix multiplied by its scales, in bfloat16; its scales are gone.

    ``block``: rows and columns that share a scale, where config.json says so. Raises WrongWeightsError for one without
    scales, or with scales that do not fit it.
    """
    widened = dict(arrays)
    for name in [name for name, dtype in dtypes.items() if dtype == FLOAT8]:
        scales = next((name + end for end in SCALES if name + end in arrays), None)
        if scales is None:
            allowed = " or ".join(name + end for end in SCALES)
            raise WrongWeightsError(f"tensor {name!r} is {FLOAT8} and has no scales: {allowed} must be there")
        full = _spread(name, arrays[name].shape, _scales(scales, arrays[scales], dtypes[scales]), block)
        # Products in float32, as the file means them: bfloat16 on both sides would round twice.
        widened[name] = (mx.from_fp8(arrays[name], mx.float32) * full).astype(mx.bfloat16)
        del widened[scales]
    return {name: array for name, array in widened.items() if not name.endswith(ACTIVATION_SCALES)}


def _scales(name: str, array: mx.array, dtype: str) -> mx.array:
    """Scales in float32."""
    if dtype == "F8_E8M0":  # a power of two, by its exponent alone
        return mx.power(mx.array(2.0), array.astype(mx.float32) - 127)
    if not mx.issubdtype(array.dtype, mx.floating):
        raise WrongWeightsError(f"scales {name!r} are {dtype}: allowed are F32, BF16, F16 and F8_E8M0")
    return array.astype(mx.float32)


def _spread(name: str, shape: tuple[int, ...], scales: mx.array, block: tuple[int, ...] | None) -> mx.array:
    """Scales in a shape that multiplies a tensor of ``shape``."""
    if scales.size == 1:
        return scales.reshape(())
    if scales.ndim == 1 and len(shape) > 1 and scales.shape[0] == shape[-2]:
        scales = scales[:, None]  # one for each output channel
    if scales.ndim != len(shape):
        raise WrongWeightsError(f"tensor {name!r} of {shape} has scales of {scales.shape}: they do not fit")
    for axis, (count, size) in enumerate(zip(scales.shape, shape, strict=True)):
        if count in (1, size):
            continue
        shared = block[axis - len(shape)] if block and axis >= len(shape) - len(block) else size // max(count, 1)
        if shared < 1 or math.ceil(size / shared) != count:
            raise WrongWeightsError(f"tensor {name!r} of {shape} has scales of {scales.shape}: they do not fit")
        scales = mx.take(mx.repeat(scales, shared, axis=axis), mx.arange(size), axis=axis)
    return scales
