"""Divide a model over the ranks of a group: each keeps its share of the heads and of the hidden units.

mlx-lm's models know how to divide themselves; here it is checked that they can. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

REPEATING = ("mlx_lm.models.qwen3_5", "mlx_lm.models.qwen3_5_moe")
"""mlx-lm's files that give the same key head to several ranks, where there are fewer heads than ranks."""


class CannotShard(Exception):  # noqa: N818 - reads as the fact it states
    """The model cannot be divided by so many; the message says what can."""


def shard(network: nn.Module, config: dict[str, object], group: mx.distributed.Group) -> None:
    """Leave of ``network`` what this rank computes; lazily where the weights are. Raises CannotShard."""
    world = group.size()
    kind = config.get("model_type", type(network).__name__)
    divide = getattr(network, "shard", None)
    if divide is None:
        raise CannotShard(f"tp: mlx-lm cannot divide a model of type {kind!r}; serve it with tp 1")
    heads, repeats = _heads(config), type(network).__module__ in REPEATING
    for name, count in heads.items():
        if not _shared(name, count, world, repeats=repeats):
            most = range(1, max(heads.values()) + 1)
            allowed = [n for n in most if all(_shared(each, m, n, repeats=repeats) for each, m in heads.items())]
            raise CannotShard(
                f"tp: {world} ranks cannot share this model's {count} {name.removeprefix('num_').replace('_', ' ')}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
    try:
        divide(group)
    except (ValueError, AssertionError, TypeError) as error:
        raise CannotShard(f"tp: this model cannot be divided by {world}: {error}") from error


def _shared(name: str, count: int, world: int, *, repeats: bool) -> bool:
    return not count % world or (repeats and name == "num_key_value_heads" and not world % count)


def _heads(config: dict[str, object]) -> dict[str, int]:
    text = config.get("text_config")
    source = {**config, **text} if isinstance(text, dict) else config
    # Latent attention has one set of keys and values, which every rank keeps.
    names = ["num_attention_heads", "linear_num_key_heads", "linear_num_value_heads"]
    names += [] if source.get("kv_lora_rank") else ["num_key_value_heads"]
    found = {name: source.get(name) for name in names}
    return {name: count for name, count in found.items() if isinstance(count, int) and count > 0}


def agreement(group: mx.distributed.Group) -> Callable[[mx.array], mx.array]:
    """What turns the tokens that each rank has drawn, int32 [n], into rank 0's, on all of them."""
    mine = 1 if group.rank() == 0 else 0

    def agree(tokens: mx.array) -> mx.array:
        # The product keeps the other ranks' tokens in the graph: their forward has to run to its end, too.
        return mx.distributed.all_sum(tokens * mine, group=group)

    return agree
