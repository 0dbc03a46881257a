"""How many tokens of prompts a step should read at most on this device: measured once, and remembered.

The longer a chunk, the fewer times are weights read for a prompt, until the device has enough to do; but whoever comes
meanwhile waits for its end. Engine thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec

from millpond.model.forwards import prefill
from millpond.model.load import LoadedModel
from millpond.model.prompt import new_prompt
from millpond.model.remember import remembered
from millpond.native import device

ON_CPU = 256
"""A CPU has enough to do by then, and attention over more costs it more than it saves in products."""
TRIED = (256, 512, 1024, 2048)
GAIN = 1.03
"""By how much faster a longer chunk must be read."""
MOST_SECONDS = 1.0
"""No chunk is tried that is likely to take longer."""


class BestChunk(msgspec.Struct, frozen=True):
    """What was measured."""

    tokens: int


def unmeasured(model: LoadedModel) -> int:
    """What will do where nothing can be measured: ranks of a group would have to stop at the same length."""
    return ON_CPU if model.on_cpu else TRIED[-1]


def measured(model: LoadedModel, content: str) -> int:
    """The best for this model, ``content`` by its digest, on this device. Raises what MLX raises."""
    if model.on_cpu:
        return ON_CPU
    about = (content, model.dtype, repr(model.form), device.name())
    find = partial(shortest_that_is_fast, partial(reading_seconds, model), model.context_length - 1)
    return remembered(BestChunk, about, lambda: BestChunk(find()), lambda _: True).tokens


def shortest_that_is_fast(seconds: Callable[[int], float], most: int = TRIED[-1]) -> int:
    """Of TRIED, up to ``most``, the shortest chunk that none beats by GAIN in tokens per second. ``seconds``: what a
    chunk takes."""
    rates: dict[int, float] = {}
    likely = 0.0
    for tokens in (length for length in TRIED if length <= most):
        if likely > MOST_SECONDS:
            break
        elapsed = seconds(tokens)
        rates[tokens], likely = tokens / elapsed, 2 * elapsed
    fastest = max(rates.values(), default=0.0)
    return next((tokens for tokens, rate in rates.items() if rate * GAIN >= fastest), TRIED[0])


def reading_seconds(model: LoadedModel, tokens: int) -> float:
    """What reading so many tokens takes once everything for it has been compiled."""
    for _ in range(2):
        begun = time.monotonic()
        prefill(model.network, new_prompt(model.network, model.form), [0] * tokens)
        elapsed = time.monotonic() - begun
    return elapsed
