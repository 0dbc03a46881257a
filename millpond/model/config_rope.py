"""Rotary settings of config.json in the words that a model class reads.

transformers 5 writes one entry, ``rope_parameters``, with the base, the scaling and the rotated share of a head in it,
or one such entry for each type of layer. Most of mlx-lm's classes read ``rope_theta``, ``rope_scaling`` and
``partial_rotary_factor``, and drop what they do not know without a word. No mlx here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Level = Mapping[str, object]
"""config.json, or its text_config."""

BASES = ("rope_theta", "rotary_emb_base", "rope_embedding_base")
SHARES = ("partial_rotary_factor", "rotary_pct")
LOCAL_BASES = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
"""Names that classes have for one thing: the base, the rotated share, the base of layers with a window."""
USUAL_BASE = 10_000.0
FIXED_SHARE = frozenset({"glm"})
"""Classes that have always rotated what they do, whatever their configs say; config_keys warns of those."""
BASE_ONLY = frozenset({"lfm2", "lfm2_moe", "granitemoehybrid", "olmo_hybrid"})
"""Classes that take rope_parameters and read nothing but the base."""
SCALING_APART = frozenset({"exaone_moe"})
"""Classes that take rope_parameters for the base, and the scaling from rope_scaling only."""
ONE_BASE_FOR_ALL = frozenset({"olmo3"})
"""Classes that scale their full-attention layers only, with one base for all."""
UNSCALED = ("default", "mrope")
"""Sections of mrope all have the same position where there is text only."""
KINDS = {
    "phi3": ("longrope", "su", "linear"),
    "deepseek": ("linear",),
    "minicpm3": ("longrope", "su"),
    "phimoe": ("longrope", "su"),
}
"""Classes that run any other scaling as none or as another, without an error."""


class UnmappedRopeError(Exception):
    """The rotary settings cannot be said in the class's words; the message names the key."""


def rope_changes(level: Level, taken: Collection[str], module: str) -> dict[str, object]:
    """What to set in ``level`` so that a class that takes the keys ``taken`` rotates as ``rope_parameters`` says.

    ``module``: the class's module in mlx-lm. Empty where there is nothing to say. Raises UnmappedRopeError.
    """
    given = level.get("rope_parameters")
    if not isinstance(given, Mapping) or not given:
        return {}
    changes: dict[str, object] = {}
    if "rope_parameters" in taken:
        if module in SCALING_APART and _scaled(given) and not level.get("rope_scaling"):
            changes["rope_scaling"] = _scaling(given)
        if module in BASE_ONLY and _scaled(given):
            raise UnmappedRopeError(_unscalable("rope_parameters", given, module))
        return changes
    flat = given
    if all(isinstance(entry, Mapping) for entry in given.values()):
        entries = {str(kind): entry for kind, entry in given.items() if isinstance(entry, Mapping)}
        flat, changes = _of_layer_types(entries, taken, module)
    return changes | _flat(flat, level, taken, module)


def check_scaling(level: Level, taken: Collection[str], module: str) -> None:
    """Raises UnmappedRopeError when ``rope_scaling`` is there and the class does not scale like that."""
    given = level.get("rope_scaling")
    if not isinstance(given, Mapping) or not _scaled(given):
        return
    if "rope_scaling" not in taken and not level.get("rope_parameters"):
        raise UnmappedRopeError(_unscalable("rope_scaling", given, module))
    allowed = KINDS.get(module)
    if allowed and rope_kind(given) not in allowed:
        raise UnmappedRopeError(
            f"rope_scaling: {rope_kind(given)!r} is no scaling of {module} models: allowed are {', '.join(allowed)}"
        )


def rope_kind(scaling: Mapping[str, object]) -> str:
    """``default``, ``linear``, ``yarn`` and so on, under whichever of its two names."""
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _scaled(scaling: Mapping[str, object]) -> bool:
    return rope_kind(scaling) not in UNSCALED and scaling.get("factor", 0) != 1


def _scaling(given: Mapping[str, object]) -> dict[str, object]:
    """The same under both names of its type, without what is no scaling."""
    rest = {name: value for name, value in given.items() if name not in ("rope_theta", *SHARES)}
    return rest | {"rope_type": rope_kind(given), "type": rope_kind(given)}


def _unscalable(key: str, given: Mapping[str, object], module: str) -> str:
    return f"{key}: {rope_kind(given)!r} is a scaling that {module} models do not take: allowed is none"


def _of_layer_types(
    entries: Mapping[str, Mapping[str, object]], taken: Collection[str], module: str
) -> tuple[Mapping[str, object], dict[str, object]]:
    """Settings of the layers that see everything, and what to set for those with a window."""
    first, *others = entries.values()
    if all(other == first for other in others):
        return first, {}
    full, local = entries.get("full_attention"), entries.get("sliding_attention")
    name = next((name for name in LOCAL_BASES if name in taken), None)
    if full is not None and local is not None and len(entries) == 2 and not _scaled(local):
        if name is not None and local.get("rope_theta") is not None:
            return full, {name: local["rope_theta"]}
        if module in ONE_BASE_FOR_ALL and local.get("rope_theta") == full.get("rope_theta"):
            return full, {}
    raise UnmappedRopeError(
        f"rope_parameters differ between {', '.join(sorted(entries))}: {module} models take one setting for all layers"
        + (f" and {name} for those with a window" if name else "")
    )


def _flat(given: Mapping[str, object], level: Level, taken: Collection[str], module: str) -> dict[str, object]:
    changes: dict[str, object] = {}
    base = given.get("rope_theta")
    if base is not None:
        name = next((name for name in BASES if name in taken), None)
        if name is not None:
            changes[name] = base
        elif base != USUAL_BASE:
            raise UnmappedRopeError(f"rope_parameters.rope_theta: {base} cannot be set in {module} models")
    if rope_kind(given) not in UNSCALED and "rope_scaling" in taken:
        changes["rope_scaling"] = _scaling(given)
    elif _scaled(given):
        raise UnmappedRopeError(_unscalable("rope_parameters", given, module))
    if "rope_scaling" in changes:
        original = given.get("original_max_position_embeddings")
        if original is not None and "original_max_position_embeddings" in taken:
            changes["original_max_position_embeddings"] = original
    share = given.get("partial_rotary_factor")
    if share is not None:
        name = next((name for name in SHARES if name in taken), None)
        if name is not None:
            changes[name] = share
        elif "rotary_dim" in taken:
            changes |= {} if level.get("rotary_dim") else {"rotary_dim": _rotary_dim(level, share)}
        elif share != 1 and module not in FIXED_SHARE:
            raise UnmappedRopeError(f"rope_parameters.partial_rotary_factor: {share} cannot be set in {module} models")
    return changes


def _rotary_dim(level: Level, share: object) -> int:
    width, heads = level.get("hidden_size"), level.get("num_attention_heads")
    head = level.get("head_dim") or (
        width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0
    )
    if not isinstance(head, int) or not isinstance(share, int | float):
        raise UnmappedRopeError(f"rope_parameters.partial_rotary_factor: {share!r} of heads of an unknown size")
    return int(head * share)
