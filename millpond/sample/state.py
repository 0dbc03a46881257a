"""What sampling knows of one request: made when it arrives, kept with it, moved on token by token.

Everything that parameters can get wrong goes wrong here, while the request is alone: what the batch does with it later
(sampler.py) is to stack numbers. A change of the batch's rows replays nothing. On the thread that owns MLX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from enum import Enum, auto

import msgspec.structs

from millpond.sample.edits import RowEdits, Table
from millpond.sample.weights import fraction_words, inverse_temperature, min_weight
from millpond.types import SamplingParams

_NUMBERS = tuple(field.name for field in msgspec.structs.fields(SamplingParams) if field.type is float)


class Filter(Enum):
    """How a sampled row's cut is found: each kind has its own, cheapest graph."""

    NONE = auto()
    TOP_P = auto()
    TOP_K = auto()


class SamplingState:
    """Of one request, after the tokens it has so far."""

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Sequence[int] = ()) -> None:
        """Raises ValueError for numbers that nothing can be drawn with."""
        for name in _NUMBERS:
            if not math.isfinite(getattr(params, name)):
                raise ValueError(f"{name} is {getattr(params, name)}; allowed: finite numbers")
        if params.repetition_penalty <= 0.0:
            raise ValueError(f"repetition_penalty is {params.repetition_penalty}; allowed: above 0")
        for token, bias in params.logit_bias.items():
            if not math.isfinite(bias):
                raise ValueError(f"logit_bias of token {token} is {bias}; allowed: finite numbers")
        self.params = params
        self.needs_history = params.needs_history
        self.filter = Filter.TOP_P if params.top_p < 1.0 else Filter.NONE
        if 0 < params.top_k < vocab_size:
            self.filter = Filter.TOP_K
        self.ranks = max(0, min(params.top_k, vocab_size))
        self.fraction = fraction_words(max(0.0, min(params.top_p, 1.0)))
        self.least = min_weight(params.min_p)
        self.inverse = 1.0 if params.greedy else inverse_temperature(params.temperature)
        self._edits = RowEdits(params, vocab_size, prompt) if params.needs_history or params.logit_bias else None

    @property
    def table(self) -> Table | None:
        """Its changes to logits; good until the next ``take``."""
        return None if self._edits is None else self._edits.table

    def take(self, token: int) -> None:
        """The answer has one more token."""
        if self._edits is not None and self.needs_history:
            self._edits.take(token)

    def ahead(self, draft: Sequence[int]) -> list[SamplingState]:
        """The states before each of ``draft`` and behind its last, as if those before had been drawn; the first is
        this one itself."""
        states = [self]
        for token in draft:
            states.append(states[-1]._after(token))
        return states

    def _after(self, token: int) -> SamplingState:
        if self._edits is None or not self.needs_history:
            return self
        state = copy(self)
        state._edits = self._edits.copy()
        state.take(token)
        return state
