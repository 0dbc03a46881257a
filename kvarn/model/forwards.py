"""The forwards of the engine: read a chunk of a prompt, and draw one token for every row.

Prompts are read one at a time in mlx-lm's own caches, and only the caches are evaluated: the logits of a chunk are
never computed. The last prompt token goes through the first decode. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from kvarn.model.lanes import Lane
from kvarn.model.upstream import PromptCache, cache_arrays


def prefill(network: nn.Module, cache: PromptCache, tokens: Sequence[int]) -> None:
    """Append ``tokens`` to a prompt's caches and wait for it. No tokens: nothing happens."""
    if tokens:
        network(mx.array([tokens], dtype=mx.int32), cache=cache)
        mx.eval(cache_arrays(cache))


def decode(network: nn.Module, lane: Lane, tokens: mx.array) -> mx.array:
    """Run each row's newest token, int [n], and return the logits of the next, [n, vocab], lazily."""
    logits = lane.forward(network, tokens[:, None])[:, -1]
    lane.advance([1] * logits.shape[0])
    return logits
