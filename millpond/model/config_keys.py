"""Keys of config.json that a model class does not take: which of them change the arithmetic, and what to do then.

A class keeps the keys that it has fields for and drops the others without a word. Most of those say nothing about the
arithmetic, or show in the tensors anyway (biases, norms, experts, tied heads), which have to match the parameters one
to one. What is left is judged here by name and value: refused where every answer would be wrong, told of where answers
may differ under some condition or where a name merely sounds like arithmetic. No mlx here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from millpond.model.config_rope import Level

NEUTRAL: tuple[object, ...] = (None, False, "", "none", "default", [], {})
"""Values that ask for nothing, whatever the key."""
MULTIPLIERS = frozenset(
    {
        *("logit_scale", "logits_scaling", "logits_scale", "embedding_multiplier", "embedding_scale", "scale_emb"),
        *("attention_multiplier", "residual_multiplier", "residual_scale", "scale_depth", "lm_head_multiplier"),
        *("query_pre_attn_scalar", "attention_scale", "attn_scale", "key_multiplier", "embeddings_multiplier"),
        *("attention_in_multiplier", "attention_out_multiplier", "mup_width_multiplier", "width_scale"),
        *("partial_rotary_factor", "rotary_pct", "rope_ratio"),
    }
)
"""Factors of what every token goes through; 1 asks for nothing."""
CAPS = frozenset(
    {
        *("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "attn_logit_softcap"),
        *("output_logits_soft_cap", "attention_logit_cap", "clip_qkv", "alibi", "use_alibi"),
    }
)
"""Bounds and biases of attention and logits; 0 asks for nothing."""
ACTIVATIONS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        (
            *("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral", "phi3", "olmo2", "olmo3", "granite"),
            *("smollm3", "internlm2", "internlm3", "deepseek", "deepseek_v2", "deepseek_v3", "glm4", "minicpm"),
        ),
        frozenset({"silu", "swish"}),
    ),
    # The first Gemma files say gelu where their own code always took its tanh form.
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), frozenset({"gelu", "gelu_pytorch_tanh", "gelu_new"})),
}
"""What classes that take no activation key compute, by their module in mlx-lm."""
BUILT_IN: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "gpt_oss": {"swiglu_limit": (7.0,), "experts_per_token": (4,), "initial_context_length": (4096,)},
    "cohere2": {"position_embedding_type": ("rope_gptj",), "use_gated_activation": (True,), "layer_switch": (4,)},
    "starcoder2": {"norm_type": ("layer_norm",), "mlp_type": ("default",)},
    "gpt2": {"scale_attn_weights": (True,)},
    "gpt_bigcode": {"scale_attn_weights": (True,), "scale_attention_softmax_in_fp32": (True,)},
    "mixtral": {"scoring_func": ("softmax",)},
    "deepseek_v2": {"scoring_func": ("softmax",)},
    "qwen": {"rotary_emb_base": (10000,), "rotary_pct": (1.0,), "scale_attn_weights": (True,)},
    "jamba": {"mamba_inner_layernorms": (True,)},
    "mamba2": {"norm_before_gate": (True,)},  # which its own code never read
    "qwen3_next": {"attn_output_gate": (True,)},
}
"""Keys whose one value is part of a class, by its module in mlx-lm."""
TOLD_ONLY: Mapping[str, frozenset[str]] = {"glm": frozenset({"partial_rotary_factor"})}
"""Keys that would be refused, of classes that have been used without them."""
WINDOWS = frozenset({"sliding_window", "sliding_window_size", "attention_chunk_size", "window_size", "layer_types"})
HARMLESS = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "model_type", "transformers_version"),
        *("torch_dtype", "dtype", "use_cache", "tokenizer_class", "vision_config", "audio_config", "text_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "cache_implementation"),
        *("quantization", "quantization_config", "hidden_act", "hidden_activation", "activation_function"),
        *("rope_parameters", "rope_scaling", "attn_implementation", "_attn_implementation", "attention_bias"),
        *("mlp_bias", "pretraining_tp", "max_window_layers", "attention_softmax_in_fp32", "attn_pdrop", "scale_attn"),
        *("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "rotary", "num_experts_per_tok"),
        *("norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_epsilon", "qk_layernorm"),
        *("use_qk_norm", "qk_norm", "rms_norm", "gated_mlp", "use_gated_rmsnorm", "head_dim", "v_head_dim"),
        *("original_max_position_embeddings", "rope_scaling_type", "rope_interleaved", "use_rope", "gate_bias"),
        *("rope_theta", "rotary_dim"),
    }
)
"""Keys without meaning for the arithmetic of a class that takes none of them, or that are looked at elsewhere."""
HARMLESS_PATTERN = re.compile(
    r"^_|initializer|dropout|_pdrop|^output_|^return_|aux_loss|z_loss|_token_id$|_token_index$|^mtp|nextn|^num_mtp"
    r"|gradient|^vision_|^image_|^audio_|^video_|^mm_|^quantiz|^use_flash|loss_coef|^ep_size$|^seq_aux$|_init$|_kernels$"
)
TELLING = re.compile(
    r"scal(e|ing)|multiplier|softcap|soft_cap|rope|rotary|window|chunk_attention|attn|attention|alibi|clip|temperature_tun"
    r"|norm_(type|topk|after|before|scheme)|norm_topk|scoring|topk_(method|group)|n_group|ntk|logn|logit|nope|gating|score_func"
)
"""Names that sound like arithmetic."""
GENERATION = frozenset({"temperature", "top_k", "top_p", "repetition_penalty", "typical_p", "diversity_penalty"})


class RefusedKeyError(Exception):
    """A key that every answer depends on cannot be followed; the message names it."""


def remarks_of(level: Level, taken: Collection[str], module: str) -> list[str]:
    """What is to be told of the keys of ``level`` (config.json or its text_config) that are not among ``taken``.

    ``module``: the class's module in mlx-lm. Raises RefusedKeyError.
    """
    _check_activation(level, taken, module)
    remarks = list(_window_remarks(level, taken, module))
    for key, value in level.items():
        if key in taken or _asks_for_nothing(key, value) or value in BUILT_IN.get(module, {}).get(key, ()):
            continue
        if key in MULTIPLIERS | CAPS and key not in TOLD_ONLY.get(module, ()):
            raise RefusedKeyError(
                f"{key}: {_shown(value)} changes every answer, and {module} models take no such key: "
                f"allowed are null, {'1' if key in MULTIPLIERS else '0'} or no such key"
            )
        if key in WINDOWS | HARMLESS - MULTIPLIERS or key in GENERATION or HARMLESS_PATTERN.search(key):
            continue
        if TELLING.search(key):
            remarks.append(f"{key}: {_shown(value)} is not followed: {module} models take no such key")
    return remarks


def _asks_for_nothing(key: str, value: object) -> bool:
    if any(value is neutral or (value == neutral and type(value) is type(neutral)) for neutral in NEUTRAL):
        return True
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    return number is not None and ((key in CAPS and number <= 0) or (key not in CAPS and number in (0, 1)))


def _check_activation(level: Level, taken: Collection[str], module: str) -> None:
    computed = ACTIVATIONS.get(module)
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        value = level.get(key)
        if computed and value is not None and key not in taken:
            if value not in computed:
                allowed = ", ".join(sorted(computed))
                raise RefusedKeyError(
                    f"{key}: {_shown(value)} is not what {module} models compute: allowed are {allowed}"
                )
            return  # the first that is there is the one that counts


def _window_remarks(level: Level, taken: Collection[str], module: str) -> Iterator[str]:
    """Of windows that a class does not have: answers differ once a prompt is longer than they are."""
    window, types = level.get("sliding_window"), level.get("layer_types")
    used = level.get("use_sliding_window", True) and isinstance(window, int) and not isinstance(window, bool)
    longest = level.get("max_position_embeddings")
    if not used or (isinstance(longest, int) and isinstance(window, int) and window >= longest):
        return
    sliding = isinstance(types, list) and "sliding_attention" in types
    if isinstance(types, list) and not sliding and types:
        return
    if "sliding_window" not in taken or (module == "llama" and not sliding):
        yield f"sliding_window: {window} is not followed: {module} models see the whole prompt, also beyond it"
    elif sliding and "layer_types" not in taken and _pattern(types) is None:
        yield f"layer_types is not followed: in {module} models every so many layers one sees the whole prompt"


def pattern_change(level: Level, taken: Collection[str]) -> dict[str, object]:
    """``sliding_window_pattern`` from ``layer_types``, for a class that takes only the first."""
    if "sliding_window_pattern" not in taken or "layer_types" in taken or "sliding_window_pattern" in level:
        return {}
    pattern = _pattern(level.get("layer_types"))
    return {"sliding_window_pattern": pattern} if pattern else {}


def _pattern(types: object) -> int | None:
    """Every how many layers one sees everything; 0 where none does, None where it is irregular or unknown."""
    if not isinstance(types, list):
        return None
    if "full_attention" not in types:
        return 0
    pattern = types.index("full_attention") + 1
    regular = all((kind == "sliding_attention") == bool((i + 1) % pattern) for i, kind in enumerate(types))
    return pattern if regular else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
