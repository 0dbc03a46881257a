"""Who may have how much of the memory. All sizes are bytes. Pure."""

from __future__ import annotations

from millpond.memory.budget import CacheSizes

FLOAT32_SHARE = 0.8
"""Of the memory, what weights in float32 may take on a CPU, where they are computed faster so."""
DEVICE_SHARE, MACHINE_SHARE = 0.9, 0.7
"""Of a GPU's memory, or else of the machine's, what weights, keys and values may take together."""
SCORES_SHARE = 0.04
"""What attention may keep of scores, where it keeps them: of the same, out of what is left to activations."""
WIRED_SHARE = 0.6
"""Of the machine's memory, what weights may take before they are wired."""
LEAST_KV_BYTES = 256 * 1024 * 1024
DRAFT_BLOCKS_SHARE = 0.4
"""Of a draft model's memory for keys and values, what cached prefixes may take."""


def held_in_float32(float_bytes: int, total: int) -> bool:
    """Whether a CPU holds weights of so many bytes in float32: better slow than swapped out."""
    return float_bytes <= total * FLOAT32_SHARE


def kv_limit(asked: int, weight_bytes: int, device: int | None, total: int, processes: int = 1) -> int:
    """Most for rows, prompts and cached blocks of one of ``processes`` that share ``total``, the machine's memory, or
    ``device``, what there is on its GPU if there is one that tells. ``asked`` is for all of them; 0: what the weights
    leave."""
    usable = int(device * DEVICE_SHARE if device is not None else total * MACHINE_SHARE) // processes
    return asked // processes or max(usable - weight_bytes, LEAST_KV_BYTES)


def wired_limit(asked: int | None, weight_bytes: int, kv_bytes: int, most: int, total: int) -> int:
    """What to keep from being swapped out, of at most so many bytes. ``asked``: that; None: weights, keys and values
    together, where the weights alone take so much of the machine's ``total`` that it would come to swapping."""
    if asked is not None:
        return asked
    return min(most, weight_bytes + kv_bytes) if weight_bytes > total * WIRED_SHARE else 0


def scores_limit(device: int | None, total: int, processes: int = 1) -> int:
    """Most for the scores of one forward, of memory as above."""
    return int((total if device is None else device) * SCORES_SHARE) // processes


def blocks_limit(asked: int | None, limit: int, processes: int = 1, free: int | None = None) -> int:
    """Of a process's ``limit`` for keys and values, most for cached blocks. ``asked`` as above; None: half of it, or
    half of what is ``free`` now that the weights are loaded, where that is told and is less: the other half is for
    rows, and what other programs hold is theirs."""
    if asked is not None:
        return min(asked // processes, limit)
    return limit // 2 if free is None else min(limit // 2, max(free // processes, LEAST_KV_BYTES) // 2)


def draft_limit(limit: int, served: CacheSizes, draft: CacheSizes) -> int:
    """Of the same, what a draft model has beside the served one: room for as many tokens."""
    return limit * draft.token_bytes // max(1, draft.token_bytes + served.token_bytes)


def fitting_kv(free: int, weight_bytes: int) -> int:
    """What to ask for where so much is free before the weights are loaded."""
    return max(0, free - weight_bytes) * 9 // 10
