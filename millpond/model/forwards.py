"""The forwards of the engine: read a chunk of a prompt, and draw one token for every row.

Prompts are read in mlx-lm's own caches, short ones together where that is faster, and only the caches are evaluated:
the logits of a chunk are never computed. The last prompt token goes through the first decode. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from millpond.model.lanes import Lane
from millpond.model.leaves import CarryLeaf, KvLeaf
from millpond.model.prompt import Prompt
from millpond.model.together import together
from millpond.model.upstream import cache_arrays


def prefill(network: nn.Module, prompt: Prompt, tokens: Sequence[int]) -> None:
    """Append ``tokens`` to a prompt, and wait for it. No tokens: nothing happens."""
    if tokens:
        network(mx.array([tokens], dtype=mx.int32), cache=prompt.caches)
        mx.eval(cache_arrays(prompt.caches))
        prompt.packed_after(prompt.length, len(tokens))


def prefill_together(network: nn.Module, prompts: Sequence[Prompt], chunks: Sequence[Sequence[int]]) -> None:
    """Append to each prompt its own chunk of two or more tokens, in one forward, and wait for it. All leaves hold keys
    and values, or what an MTP head goes on from."""
    counts = [len(chunk) for chunk in chunks]
    rows = [[*chunk, *[chunk[-1]] * (max(counts) - len(chunk))] for chunk in chunks]
    offset = mx.array([prompt.length for prompt in prompts], dtype=mx.int32)
    layers = zip(*(cast(list[KvLeaf | CarryLeaf], prompt.leaves) for prompt in prompts), strict=True)
    network(mx.array(rows, dtype=mx.int32), cache=[together(layer, counts, offset) for layer in layers])
    mx.eval([cache_arrays(prompt.caches) for prompt in prompts])
    for prompt, count in zip(prompts, counts, strict=True):
        prompt.packed_after(prompt.length, count)


def decode(network: nn.Module, lane: Lane, tokens: mx.array) -> mx.array:
    """Run each row's newest token, int [n], and return the logits of the next, [n, vocab], lazily."""
    logits = lane.forward(network, tokens[:, None])[:, -1]
    lane.advance([1] * logits.shape[0])
    return logits
