"""Reads a chunk of a prompt and measures what the model thought of the tokens that it read.

Logits are made for one piece at a time, because those of a chunk would take more memory than all else, and reduced on
the device to a few numbers per token. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from millpond.model.prompt import Prompt
from millpond.model.upstream import cache_arrays
from millpond.sample.logprobs import measure
from millpond.sample.weights import SortKeys
from millpond.types import GRID, TokenLogprob


def score(
    network: nn.Module, prompt: Prompt, tokens: Sequence[int], following: Sequence[int], count: int
) -> list[TokenLogprob]:
    """Append ``tokens`` to a prompt, and wait for it. ``following`` are the tokens behind each of them, whose
    log-probabilities come back, with their ranks and the ``count`` likeliest in their place. Raises ArithmeticError for
    logits that are not finite."""
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), GRID):
        piece = tokens[start : start + GRID]
        logits = network(mx.array([piece], dtype=mx.int32), cache=prompt.caches)[0].astype(mx.float32)
        found += _measured(logits, following[start : start + GRID], count, cache_arrays(prompt.caches))
        prompt.packed_after(prompt.length, len(piece))
    return found


def _measured(logits: mx.array, following: Sequence[int], count: int, also: Sequence[mx.array]) -> list[TokenLogprob]:
    """``logits`` float32 [n, V] of n tokens. ``also`` is to be evaluated, too."""
    chosen = mx.array(list(following), dtype=mx.int32)
    peak = mx.max(logits, axis=-1, keepdims=True)
    probable = measure(logits, peak, chosen, min(count, logits.shape[-1]), SortKeys(logits.shape[-1]))
    likelier = mx.sum(logits > mx.take_along_axis(logits, chosen[:, None], axis=-1), axis=-1)
    mx.eval(peak, likelier, probable.chosen, probable.top_ids, probable.top_values, *also)
    if not np.isfinite(np.array(peak)).all():
        raise ArithmeticError("the model produced logits that are not finite")
    tops = zip(np.array(probable.top_ids).tolist(), np.array(probable.top_values).tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, list(zip(ids, values, strict=True)), rank + 1)
        for token, logprob, (ids, values), rank in zip(
            following, np.array(probable.chosen).tolist(), tops, np.array(likelier).tolist(), strict=True
        )
    ]
