"""From GGUF metadata to config.json.

GGUF keys carry the architecture as a prefix (``llama.block_count``). Anything that would change the model's arithmetic
and that we do not map is refused here: a model converted wrongly answers fluently and wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType

from millpond.hub.errors import SourceError
from millpond.hub.gguf_file import text_or_number

Scalar: TypeAlias = int | float | bool | str
Json: TypeAlias = "Scalar | list[Json] | dict[str, Json] | None"
Config: TypeAlias = "dict[str, Json]"
Metadata: TypeAlias = Mapping[str, Scalar]

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""GGUF architecture → model_type of config.json."""

GEMMA3_WINDOW_PATTERN = 6
"""Every sixth layer of Gemma 3 looks at the whole context; GGUF files do not say so."""
GEMMA3_LOCAL_ROPE_BASE = 10_000.0
MOST = 1 << 30
"""Of any count in the file."""
LLAMA3_ORIGINAL_CONTEXT = 8192
LLAMA3_LOW_FACTOR, LLAMA3_HIGH_FACTOR = 1.0, 4.0


def read_metadata(reader: GGUFReader) -> dict[str, Scalar]:
    """All scalar and string fields; arrays (the vocabulary) are left where they are. Raises SourceError."""
    return {
        name: text_or_number(reader, name)
        for name, field in reader.fields.items()
        if field.types and field.types[0] != GGUFValueType.ARRAY
    }


def architecture(metadata: Metadata) -> str:
    """The file's architecture. Raises SourceError when there is no conversion for it."""
    name = str(metadata.get("general.architecture", ""))
    if name not in MODEL_TYPES:
        raise SourceError(f"GGUF architecture {name!r}: allowed are {', '.join(sorted(MODEL_TYPES))}")
    experts = metadata.get(f"{name}.expert_count", 0)
    if experts:
        raise SourceError(f"GGUF architecture {name!r} with {experts} experts: only models without experts are allowed")
    return name


def build_config(
    metadata: Metadata, vocab_size: int, tied: bool, rope_factors: npt.NDArray[np.float32] | None
) -> Config:
    """config.json without its quantization entry.

    ``tied``: the output head is the embedding. ``rope_factors``: the file's per-frequency divisors, shape
    [rotary_dims / 2], or None.
    """
    arch = architecture(metadata)

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise SourceError(f"GGUF field {arch}.{key} is missing, or is an array")
        if isinstance(value, str | bool) or not 0 < value < math.inf:
            raise SourceError(f"GGUF field {arch}.{key} is {value!r}: a number above 0 is allowed")
        return value

    def count(key: str, default: int | None = None) -> int:
        value = number(key, default)
        if value != int(value) or value > MOST:
            raise SourceError(f"GGUF field {arch}.{key} is {value}: a whole number of at most {MOST} is allowed")
        return int(value)

    heads = count("attention.head_count")
    width = count("embedding_length")
    head_dim = count("attention.key_length", width // heads)
    context = count("context_length")
    for key in ("rope.dimension_count", "attention.value_length"):
        if (given := count(key, head_dim)) != head_dim:
            raise SourceError(f"GGUF field {arch}.{key} is {given}: only {head_dim}, a whole head, is allowed")
    config: Config = {
        "model_type": MODEL_TYPES[arch],
        "hidden_size": width,
        "num_hidden_layers": count("block_count"),
        "intermediate_size": count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(number("rope.freq_base", 10_000.0)),
        "max_position_embeddings": context,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "rope_scaling": _rope_scaling(metadata, arch, head_dim, rope_factors, number),
    }
    if arch == "gemma3":
        config |= {
            "sliding_window": count("attention.sliding_window"),
            "sliding_window_pattern": GEMMA3_WINDOW_PATTERN,
            "rope_local_base_freq": GEMMA3_LOCAL_ROPE_BASE,
            "query_pre_attn_scalar": _gemma3_query_scalar(width, heads, head_dim),
        }
    elif arch == "qwen2":
        # The other architectures' files never carry an explicit head size that differs; Qwen2 has no such setting.
        del config["head_dim"]
    return config


def _gemma3_query_scalar(width: int, heads: int, head_dim: int) -> int:
    """Attention is scaled by the head size, except in the 27B model (width 5376), which uses width / heads."""
    return width // heads if width == 5376 else head_dim


def _rope_scaling(
    metadata: Metadata,
    arch: str,
    head_dim: int,
    factors: npt.NDArray[np.float32] | None,
    number: Callable[[str], float],
) -> Config | None:
    kind = str(metadata.get(f"{arch}.rope.scaling.type", "none"))
    if factors is not None:
        return _llama3_scaling(metadata, arch, head_dim, factors)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": float(number("rope.scaling.factor"))}
    raise SourceError(f"GGUF field {arch}.rope.scaling.type is {kind!r}: allowed are 'none' and 'linear'")


def _llama3_scaling(metadata: Metadata, arch: str, head_dim: int, factors: npt.NDArray[np.float32]) -> Config:
    """Recover Llama 3's scaling from the divisors it leads to, and check that it leads to them."""
    factor = float(factors.max())
    base = float(metadata.get(f"{arch}.rope.freq_base", 10_000.0))
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = LLAMA3_ORIGINAL_CONTEXT * frequency / (2 * math.pi)
    smooth = np.clip((turns - LLAMA3_LOW_FACTOR) / (LLAMA3_HIGH_FACTOR - LLAMA3_LOW_FACTOR), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise SourceError("GGUF tensor rope_freqs.weight: only the frequency scaling of Llama 3 is allowed")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: files store 1e-05 as a float32, which widens to 9.99999975e-06."""
    return float(str(np.float32(value)))
