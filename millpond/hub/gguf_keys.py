"""Which fields of a GGUF file are followed, which may be passed over, and which are refused.

Fields under the architecture's own name are hyperparameters. One that is neither mapped nor harmless would change the
model's arithmetic without a word, so it is refused unless its value asks for nothing. All others describe the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from millpond.hub.errors import SourceError

Value = int | float | bool | str

MAPPED = frozenset(
    {
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "expert_count"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type"),
        "rope.scaling.factor",
    }
)
HARMLESS = frozenset(
    {
        *("vocab_size", "tensor_data_layout", "expert_used_count", "pooling_type", "rope.scaling.finetuned"),
        *("rope.scaling.original_context_length", "nextn_predict_layers"),
        # Of a kind of scaling that is refused as such.
        *("rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
HARMLESS_PREFIXES = ("vision.", "mm.")
OWN = {"gemma3": frozenset({"attention.sliding_window"})}
"""Mapped for one architecture."""
BUILT_IN: Mapping[str, Mapping[str, tuple[Value, ...]]] = {
    "gemma3": {
        "attention.sliding_window_pattern": (6,),
        "rope.freq_base_swa": (10_000.0,),
        "rope.local.freq_base": (10_000.0,),
    }
}
"""Values that are part of an architecture."""
SAME_AS_NONE: Mapping[str, tuple[Value, ...]] = {
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "attention.output_scale"), (1.0,)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scale_linear", "attention.causal"), (1.0,)),
}
"""Values besides 0 that ask for nothing."""


def check_keys(arch: str, fields: Iterable[tuple[str, Value]], context: int) -> None:
    """Raises SourceError, which names the field, for one that would have to be followed and is not.

    ``fields``: name and value, ``an array`` for one that is an array. ``context``: tokens, at most.
    """
    known = MAPPED | HARMLESS | OWN.get(arch, frozenset())
    for name, value in fields:
        key = name.removeprefix(f"{arch}.")
        if key == name or key in known or key.startswith(HARMLESS_PREFIXES):
            continue
        # What 0 means of this one is not nothing: nobody looks at anybody.
        if key != "attention.causal" and value in (0, "", "none"):
            continue
        if value in (*SAME_AS_NONE.get(key, ()), *BUILT_IN.get(arch, {}).get(key, ())):
            continue
        if key == "attention.sliding_window" and isinstance(value, int) and value >= context:
            continue
        raise SourceError(f"GGUF field {name} is {value!r}: {arch} models are converted only without such a field")
