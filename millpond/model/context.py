"""How many tokens a model was made for, by its config.json. No mlx here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from millpond.model.config_rope import rope_kind

NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "max_sequence_length", "seq_length"),
    *("max_seq_length", "n_ctx", "max_context_length", "context_length", "block_size"),
)
DEFAULT_CONTEXT = 4096
"""Context length of a model whose config names none."""
STRETCHED = ("linear", "dynamic", "yarn", "deepseek_yarn", "llama3", "longrope", "su")
"""Rotary scalings that make a model read further than it was trained to."""


class Context(NamedTuple):
    """Tokens of prompt and answer together."""

    usual: int
    most: int | None
    """None: config.json sets no limit."""
    reason: str
    """What sets the limit, in the words of config.json."""


def context_of(config: Mapping[str, object]) -> Context:
    """The context of a model by its config.json and the text_config in it."""
    text = config.get("text_config")
    levels = [config, text] if isinstance(text, Mapping) else [config]
    named, name = next(((n, key) for level in levels for key in NAMES if (n := _count(level.get(key)))), (0, ""))
    scaling = next((s for level in levels if (s := _scaling(level))), {})
    if not named:
        return Context(DEFAULT_CONTEXT, None, "")
    factor = scaling.get("factor")
    if rope_kind(scaling) not in STRETCHED or not isinstance(factor, int | float) or factor <= 1:
        return Context(named, named, f"{name} is {named}")
    original = _count(scaling.get("original_max_position_embeddings"))
    reached = int(factor * (original or named))
    reason = f"{name} is {named} and the rotary scaling {rope_kind(scaling)} {factor:g} times {original or named}"
    # Files that do not say what was scaled may mean by the length what came out of it: more has to be asked for.
    return Context(max(named, reached if original else 0), max(named, reached), reason)


def _scaling(level: Mapping[str, object]) -> Mapping[str, object]:
    for key in ("rope_scaling", "rope_parameters"):
        value = level.get(key)
        if isinstance(value, Mapping):
            full = value.get("full_attention")
            return full if isinstance(full, Mapping) else value
    return {}


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
