"""The forwards of the engine: read a chunk of a prompt, and draw one token for every row.

Prompts are read one at a time in mlx-lm's own caches, and only the caches are evaluated: the logits of a chunk are
never computed. The last prompt token goes through the first decode. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from millpond.model.lanes import Lane
from millpond.model.prompt import Prompt
from millpond.model.upstream import cache_arrays


def prefill(network: nn.Module, prompt: Prompt, tokens: Sequence[int]) -> None:
    """Append ``tokens`` to a prompt, and wait for it. No tokens: nothing happens."""
    if tokens:
        network(mx.array([tokens], dtype=mx.int32), cache=prompt.caches)
        mx.eval(cache_arrays(prompt.caches))
        prompt.packed_after(prompt.length, len(tokens))


def decode(network: nn.Module, lane: Lane, tokens: mx.array) -> mx.array:
    """Run each row's newest token, int [n], and return the logits of the next, [n, vocab], lazily."""
    logits = lane.forward(network, tokens[:, None])[:, -1]
    lane.advance([1] * logits.shape[0])
    return logits
