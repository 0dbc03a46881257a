"""Small models whose layers C computes as a whole: every family, rotation and kind of weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
import tiny_models
from mlx.utils import tree_flatten, tree_map

from millpond.model.load import LoadedModel, load
from millpond.types import UNPACKED, KvPacking

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": 1.0, "long_factor": [1.0 + 0.1 * i for i in range(16)]}
PHI3: dict[str, object] = {
    "model_type": "phi3",
    "num_key_value_heads": 1,
    "num_attention_heads": 2,
    "rope_scaling": LONG,
}
PHI3 |= {"partial_rotary_factor": 0.5, "max_position_embeddings": 512, "original_max_position_embeddings": 64}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen2": ("llama", {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma3_text": ("gemma3_text", {"rope_theta": 1_000_000.0}),
    "llama, scaled": ("llama", {"rope_scaling": LLAMA3}),
    "llama, by YaRN": ("llama", {"rope_scaling": YARN}),
    "phi3": ("llama", PHI3),
}
"""Of tiny_models, and what is different."""
WEIGHTS = ("float32", "bfloat16", "4 bits", "mxfp4")


@cache
def folder(kind: str, weights: str) -> Path:
    """Sizes that all formats can have."""
    place = Path(mkdtemp())
    base, changes = KINDS[kind]
    config = {**tiny_models.config_of(base), "hidden_size": 128, "intermediate_size": 256, "head_dim": 64, **changes}
    network = tiny_models.build(kind, config=config)
    if weights == "bfloat16":
        network.update(tree_map(lambda array: array.astype(mx.bfloat16), network.parameters()))
    elif weights != "float32":
        mode, group = ("affine", 64) if weights == "4 bits" else (weights, 32)
        nn.quantize(network, group_size=group, bits=4, mode=mode)
        config["quantization"] = {"group_size": group, "bits": 4, "mode": mode}
    mx.save_safetensors(str(place / "model.safetensors"), dict(tree_flatten(network.parameters())))
    (place / "config.json").write_text(json.dumps(config))
    return place


def model(kind: str, weights: str, packing: KvPacking = UNPACKED) -> LoadedModel:
    return load(folder(kind, weights), 0, lambda _done: None, packing)
