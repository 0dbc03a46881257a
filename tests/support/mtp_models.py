"""Tiny models that bring an MTP head, their tensors named as their families publish them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tiny_models import CONTEXT, RECURRENT, VOCAB, build, config_of

from millpond.model.heads import LAYOUTS, HeadLayout, fitted
from millpond.model.opened import OpenModel, open_model
from millpond.types import UNPACKED, KvPacking

Weights = dict[str, mx.array]

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
_LATENT = {
    **_SHARED,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
_QWEN3_5 = {**RECURRENT["qwen3_5"], "mtp_num_hidden_layers": 1}
HEADED: dict[str, dict[str, object]] = {
    "qwen3_next": {**config_of("qwen3_next"), **_EXPERTS, "norm_topk_prob": True},
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": {**_QWEN3_5, **_EXPERTS, "model_type": "qwen3_5_moe", "shared_expert_intermediate_size": 32},
    "deepseek_v3": {**_LATENT, "model_type": "deepseek_v3"},
    "glm4_moe_lite": {**_LATENT, "model_type": "glm4_moe_lite"},
    "glm4_moe": {
        **{name: value for name, value in _LATENT.items() if "lora" not in name and "qk_" not in name},
        "model_type": "glm4_moe",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_scaling": None,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
    },
    "mimo": {**_SHARED, "model_type": "mimo", "num_hidden_layers": 3, "num_nextn_predict_layers": 1},
    "nemotron_h": {
        **RECURRENT["nemotron_h"],
        "hybrid_override_pattern": ["M", "E", "*", "M", "-", "*"],
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
    },
}
"""By the module of their class in mlx-lm."""
_QWEN = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
WITH_STATES = (*_QWEN, "nemotron_h")
SILENT = ("o_proj", "out_proj", "down_proj", "fc2")
"""What ends a layer's parts: without them a layer adds nothing, and a token decides alone what comes next."""


def prefix_of(kind: str) -> str:
    """What the tensors of a head begin with."""
    return {"mimo": "model.mtp_layers.0."}.get(kind, "mtp." if kind in WITH_STATES else "model.layers.3.")


def layout_of(kind: str) -> HeadLayout:
    """Of the head that ``head_weights`` makes."""
    if kind != "nemotron_h":
        return LAYOUTS[kind]
    names = ("layers.0.mixer.q_proj.weight", "layers.1.mixer.switch_mlp.fc1.weight", "layers.1.final_layernorm.weight")
    return fitted(dict.fromkeys(names, mx.zeros(1)), LAYOUTS[kind])[1]


def trunk_weights(kind: str, seed: int = 0, *, silent: bool = False) -> Weights:
    mx.random.seed(seed)  # some parameters are drawn when a model is made
    weights = dict(tree_flatten(build(kind, seed, HEADED[kind]).parameters()))
    return _silenced(weights) if silent else weights


def head_weights(kind: str, seed: int = 7, *, oracle: bool = False) -> Weights:
    """By their published names. ``oracle``: behind a model whose layers add nothing it guesses what that will draw."""
    layout, prefix = layout_of(kind), prefix_of(kind)
    one = dict(tree_flatten(build(kind, seed, {**HEADED[kind], **layout.one_layer}).parameters()))
    one = {name.removeprefix("language_model."): array for name, array in one.items()}
    found = {}
    for name, array in (_silenced(one) if oracle else one).items():
        if name.startswith(layout.into):
            found[f"{prefix}{layout.layer}{name.removeprefix(layout.into)}"] = array
    size = 64
    ours = {
        "embedding_norm": mx.ones(size) if oracle else 1 + 0.3 * mx.random.normal((size,)),
        "hidden_norm": mx.ones(size) if oracle else 1 + 0.3 * mx.random.normal((size,)),
        "fc": mx.random.normal((size, 2 * size)) * 0.2,
    }
    if oracle:
        sides = [mx.eye(size), mx.zeros((size, size))]
        ours["fc"] = mx.concatenate(sides if layout.embedding_first else sides[::-1], axis=1)
    for name, own in layout.joint.items():
        found[f"{prefix}{name}.weight"] = ours[own]
    found[f"{prefix}{layout.final}.weight"] = mx.ones(size) if oracle else 1 + 0.3 * mx.random.normal((size,))
    for again in layout.shared:
        found[f"{prefix}{again}weight"] = mx.zeros((VOCAB, size))
    mx.eval(found)
    return found


def _silenced(weights: Weights) -> Weights:
    return {name: mx.zeros_like(a) if any(part in name for part in SILENT) else a for name, a in weights.items()}


def write(folder: Path, config: Mapping[str, object], weights: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_headed(kind: str, folder: Path, *, oracle: bool = False) -> Path:
    """A converted model that has kept its head."""
    weights = trunk_weights(kind, silent=oracle) | head_weights(kind, oracle=oracle)
    return write(folder, HEADED[kind], weights)


@cache
def opened_headed(kind: str, packing: KvPacking = UNPACKED, *, oracle: bool = False, head: bool = True) -> OpenModel:
    """As the engine opens it; once for all tests, which leave it as it is."""
    return open_model(save_headed(kind, Path(mkdtemp()), oracle=oracle), packing=packing, head=head)


def quantized(weights: Weights, wanted: Callable[[str], bool], bits: int = 4) -> Weights:
    """With the matrices of those names packed as MLX packs them."""
    found: Weights = {}
    for name, array in weights.items():
        packable = array.ndim > 1 and array.shape[-1] % 32 == 0 and name.endswith(".weight")
        if not packable or name.endswith(("mlp.gate.weight", "mixer.gate.weight")) or not wanted(name):
            found[name] = array
            continue
        base = name.removesuffix("weight")
        packed = mx.quantize(array, group_size=32, bits=bits)
        found |= dict(zip((f"{base}weight", f"{base}scales", f"{base}biases"), packed, strict=True))
    return found


def published(weights: Weights, fused: Callable[[str], bool] = lambda _: False) -> Weights:
    """A converted Qwen model as its authors publish it: norms around zero, convolutions as torch has them, and each
    expert apart, or of layers with ``fused`` names all in two arrays."""
    found: Weights = {}
    for name, array in weights.items():
        name = name.removeprefix("language_model.")
        if "norm" in name and array.ndim == 1 and "linear_attn.norm" not in name:
            array = array - 1.0
        if "conv1d" in name:
            array = array.moveaxis(1, 2)
        before, _, behind = name.partition("switch_mlp.")
        if not behind:
            found[name] = array
        elif not fused(name):
            found |= {f"{before}experts.{number}.{behind}": expert for number, expert in enumerate(array)}
        elif behind == "down_proj.weight":
            found[f"{before}experts.down_proj"] = array
        else:
            found[f"{before}experts.{behind}"] = array
    for name in [name for name in found if name.endswith("experts.gate_proj.weight")]:
        sides = [found.pop(name), found.pop(name.replace("gate_proj", "up_proj"))]
        found[name.replace("gate_proj.weight", "gate_up_proj")] = mx.concatenate(sides, axis=1)
    return found


def parameters(module: nn.Module) -> Weights:
    return dict(tree_flatten(module.parameters()))
