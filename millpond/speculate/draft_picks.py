"""How a draft model's guess is drawn from its logits: as the served model will draw at the same position."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from msgspec import structs

from millpond.sample.sampler import BatchSampler, Picks
from millpond.sample.state import SamplingState
from millpond.types import SamplingParams

NEVER = -1e30
"""Logit of a token that only the served model knows; finite, because what is not would count as a failure."""


class DraftPicks:
    """Draws for the requests that are asked for, in the served model's vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._sampler: BatchSampler | None = None

    def state(self, params: SamplingParams) -> SamplingState:
        """What decides the draws of one request, without what depends on tokens that nobody has drawn yet, and what
        nobody asks of a draft. Raises ValueError for numbers that nothing can be drawn with."""
        plain = structs.replace(
            params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logprobs=None, min_tokens=0
        )
        return SamplingState(plain, self._vocab_size)

    def __call__(self, logits: mx.array, states: tuple[SamplingState, ...], positions: Sequence[int]) -> Picks:
        """Lazily, one token per row of ``logits`` [n, V]. ``positions``: index of each in its whole sequence."""
        if self._sampler is None or self._sampler.states != states:
            self._sampler = BatchSampler(states, self._vocab_size)
        return self._sampler(self._fitted(logits), positions)

    def _fitted(self, logits: mx.array) -> mx.array:
        """The logits cut or filled to the served model's vocabulary: models may pad it to different sizes."""
        missing = self._vocab_size - logits.shape[1]
        if missing <= 0:
            return logits[:, : self._vocab_size]
        return mx.pad(logits.astype(mx.float32), [(0, 0), (0, missing)], constant_values=mx.array(NEVER))
