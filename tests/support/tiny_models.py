"""Tiny models with random weights, one per cache kind, saved as ordinary MLX folders so that the real loader runs."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from millpond.model.load import LoadedModel
from millpond.model.opened import OpenModel, open_model
from millpond.model.probe import Capabilities
from millpond.types import UNPACKED, KvPacking

VOCAB = 256
CONTEXT = 512

_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
}

CONFIGS: dict[str, dict[str, object]] = {
    "llama": {**_COMMON, "model_type": "llama", "head_dim": 16},
    "qwen3": {**_COMMON, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        **_COMMON,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_hidden_layers": 6,
        "sliding_window": 24,
        "sliding_window_pattern": 3,
        "rope_global_base_freq": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": 16,
    },
    "deepseek_v2": {
        **_COMMON,
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "n_routed_experts": None,
        "n_shared_experts": None,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 4,
        "attention_bias": False,
        "rope_scaling": {
            "type": "yarn",
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": CONTEXT,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
    "mamba": {
        "model_type": "mamba",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 8,
        "num_hidden_layers": 3,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
    },
    "qwen3_next": {
        **_COMMON,
        "model_type": "qwen3_next",
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
    "lfm2": {
        "model_type": "lfm2",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
        "rope_theta": 10000.0,
    },
}

_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
RECURRENT: dict[str, dict[str, object]] = {
    "qwen3_5": {**_COMMON, **_LINEAR, "model_type": "qwen3_5", "head_dim": 64, "full_attention_interval": 2},
    "mamba2": {
        "model_type": "mamba2",
        "num_heads": 8,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 32,
        "num_hidden_layers": 3,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": (0.01, 10),
        "time_step_rank": "auto",
        "max_position_embeddings": CONTEXT,
    },
    "falcon_h1": {
        **_COMMON,
        "model_type": "falcon_h1",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "attention_in_multiplier": 1.0,
    },
    "nemotron_h": {
        **_COMMON,
        "model_type": "nemotron_h",
        "num_hidden_layers": 6,
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "n_groups": 2,
        "time_step_limit": (0.001, 10.0),
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "head_dim": 16,
        "hybrid_override_pattern": ["M", "-", "*", "M", "-", "*"],
    },
    "kimi_linear": {
        **_COMMON,
        "model_type": "kimi_linear",
        "head_dim": 32,
        "linear_attn_config": {"num_heads": 4, "head_dim": 32, "kda_layers": [1, 3], "short_conv_kernel_size": 4},
        "model_max_length": CONTEXT,
        "num_experts": 2,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}
"""Models with recurrent layers, each in a way of its own: states beside keys in a layer, layers without keys, latent
ones."""
ODD: dict[str, dict[str, object]] = {
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        "hidden_size": 64,
        "attention_bias": False,
        "conv1d_width": 4,
        "intermediate_size": 128,
        "logits_soft_cap": 30.0,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_window_size": 64,
        "vocab_size": VOCAB,
        "block_types": ["recurrent", "recurrent", "attention"],
        "max_position_embeddings": CONTEXT,
    },
    "plamo3": {
        **_COMMON,
        "model_type": "plamo3",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "window_size": 48,
        "sliding_window_pattern": 2,
    },
    "sliding_llama": {
        **_COMMON,
        "model_type": "llama",
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "longcat_flash": {
        **_COMMON,
        "model_type": "longcat_flash",
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 2,
        "zero_expert_num": 2,
        "num_layers": 2,
        "num_hidden_layers": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_bias": False,
    },
}
"""Models of which one thing is special."""

WIDE = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "qwen3": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 80},
}
"""Heads as wide as real models have them, whose keys and values can be packed."""
CONFIGS_WIDE = {f"wide_{kind}": {**CONFIGS[kind], **wide} for kind, wide in WIDE.items()}
CONFIGS_MIXED = {
    "qwen3_moe": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
}
"""Mixtures of experts."""

SLOT_KINDS = ("llama", "qwen3", "gemma3_text", "deepseek_v2")
STATE_KINDS = ("mamba", "lfm2", "qwen3_next")
"""With recurrent layers. Of the first nothing can be taken back: its recurrence is a loop in its layers."""
HYBRID_KINDS = ("lfm2", "qwen3_next", *RECURRENT)
"""Those of whose recurrences it is noted what they were given."""
SOLO_KINDS = ("recurrent_gemma",)
"""Its first token is another thing than a token behind a state of zeros."""


def config_of(kind: str) -> dict[str, object]:
    return {**CONFIGS, **CONFIGS_WIDE, **CONFIGS_MIXED, **RECURRENT, **ODD}[kind]


def build(kind: str, seed: int = 0, config: Mapping[str, object] | None = None) -> nn.Module:
    """A model of ``kind`` in float32, with weights large enough that its next token depends on the whole context."""
    config = config or config_of(kind)
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    network = module.Model(module.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    network.update(
        tree_map(
            lambda array: (
                mx.random.normal(array.shape) * (2.0 / max(array.shape[-1], 1) ** 0.5)
                if array.ndim > 1
                else array.astype(mx.float32)
            ),
            network.parameters(),
        )
    )
    mx.eval(network.parameters())
    return network


def save(kind: str, folder: Path, seed: int = 0, config: Mapping[str, object] | None = None) -> Path:
    """Write a tiny model of ``kind`` as an MLX folder (no tokenizer); ``config`` instead of its usual one."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(build(kind, seed, config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config or config_of(kind)))
    return folder


@cache
def opened(kind: str, packing: KvPacking = UNPACKED) -> OpenModel:
    """A tiny model as the engine opens it; once for all tests, which leave it as it is."""
    return open_model(save(kind, Path(mkdtemp())), packing=packing)


def model(kind: str) -> LoadedModel:
    return opened(kind).model


def capabilities(kind: str) -> Capabilities:
    return opened(kind).capabilities


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens by chance, always the same ones."""
    chooser = random.Random(length * 1000 + seed)
    return [chooser.randrange(VOCAB) for _ in range(length)]


def thin(whole: Path, folder: Path) -> Path:
    """A real model's tokenizer and keys and values as large as its, around random weights that are a fraction of it."""
    config = json.loads((whole / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64}
    del config["quantization"]
    save(config["model_type"], folder, config=config)
    for file in whole.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    return folder
